"""The clock of stamps that several processes of a host compare: CLOCK_MONOTONIC, which begins anew with each boot."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path


@cache
def clock_id() -> str:
    """What processes with the same clock have in common: the boot, and the time namespace of containers that have one.
    Empty where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        offsets = Path("/proc/self/timens_offsets")
        shift = "".join(offsets.read_text().split()) if offsets.exists() else ""
    except OSError:
        return ""
    return f"{boot} {shift}".strip()[:256]


def stamp() -> int:
    """Nanoseconds since a moment that all who have the same ``clock_id`` share."""
    return time.monotonic_ns()
