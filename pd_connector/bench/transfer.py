"""How fast do scattered blocks get from one process to another? The engine of ``pdc bench transfer``.

An owner's process and this one, joined by one transport; random source blocks go to random destination blocks, fresh
ones each time, and every byte is compared each time. What it is measured beside runs right before each iteration.
"""

from __future__ import annotations

import select
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from pd_connector.bench import veth
from pd_connector.bench.case import Case, options
from pd_connector.bench.limit import memory_limits
from pd_connector.bench.owner import CAPABILITY, LEASE, Owner
from pd_connector.bench.work import Cache, Work
from pd_connector.errors import TransferFailed, TransportUnavailable
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.registry import load

DEADLINE_S = 60.0

Beside = Callable[[Case], Mapping[str, float]]
"""GB/s of something else that moves the same chunks, by name, measured now."""


def limits_of(case: Case) -> Mapping[str, float]:
    return memory_limits(case.chunk_bytes, case.chunks, huge=case.huge)


def measure(case: Case, beside: Beside = limits_of, start: Callable[[Case], Owner] = Owner) -> dict[str, Any]:
    """One case as a row: GB/s of ours (median, min, max), the medians of what it ran beside and the ratios to them, and
    CPU seconds of both ends. ``start`` makes the owner. Raises TransportUnavailable, TransferFailed (also for wrong
    bytes)."""
    gbps: list[float] = []
    others: list[Mapping[str, float]] = []
    cpu, num_bytes = 0.0, case.chunks * case.chunk_bytes
    with pair(case, start) as both:
        for number in range(case.rounds + 1):
            figures = beside(case)
            seconds, used = both.read()
            if number:  # the first one finds pages that were never touched
                gbps.append(num_bytes / seconds / 1e9)
                others.append(figures)
                cpu += used
    row: dict[str, Any] = {
        "transport": case.transport,
        "scope": case.scope,
        "memory": case.memory,
        "pages": "huge" if case.huge else "4K",
        "chunk_bytes": case.chunk_bytes,
        "chunks": case.chunks,
        "bytes": num_bytes,
        "threads": case.threads,
        "pin": case.pin,
        "rounds": case.rounds,
        "gbps_median": round(statistics.median(gbps), 3),
        "gbps_min": round(min(gbps), 3),
        "gbps_max": round(max(gbps), 3),
    }
    medians = {name: statistics.median(figures[name] for figures in others) for name in others[0]}
    row |= {f"limit_{name}_gbps": round(value, 3) for name, value in medians.items()}
    row |= {f"ratio_{name}": round(statistics.median(gbps) / value, 3) for name, value in medians.items()}
    return row | {"cpu_s_per_gb": round(cpu / (num_bytes * case.rounds) * 1e9, 3), "verified": True}


class Pair:
    """A reader here, connected to an owner in its own process."""

    def __init__(self, case: Case, reader: Transport, owner: Owner) -> None:
        self._reader, self._owner = reader, owner
        self._tags = count(1)
        mine = Cache(case.chunk_bytes, case.blocks, pooled=False, huge=case.huge)
        reader.register([mine.region])
        self._work = Work(mine)
        reason = reader.can_reach(owner.description)
        if reason is not None:
            raise TransportUnavailable(case.transport, reason)
        reader.connect("owner", owner.description, tag := next(self._tags))
        wait(reader, tag)

    def read(self) -> tuple[float, float]:
        """(seconds from the post to the completion, CPU seconds of both processes) of one read; the bytes are right."""
        plan = self._work.plan()
        used = self._owner.cpu_seconds(touch=True) + time.process_time()
        start = time.perf_counter()
        self._reader.post_read("owner", LEASE, CAPABILITY, plan, tag := next(self._tags))
        wait(self._reader, tag)
        seconds = time.perf_counter() - start
        used = self._owner.cpu_seconds() + time.process_time() - used
        self._work.check()
        return seconds, used


@contextmanager
def pair(case: Case, start: Callable[[Case], Owner] = Owner) -> Iterator[Pair]:
    """Raises ConfigError, TransportUnavailable, TransferFailed."""
    case.check()
    kind = load(case.transport)
    reason = kind.probe({})
    if reason is not None:
        raise TransportUnavailable(case.transport, reason)
    reader = kind("reader", options(case, veth.HERE))
    try:
        with start(case) as owner:
            yield Pair(case, reader, owner)
    finally:
        reader.close()


def wait(transport: Transport, tag: int) -> None:
    """Until ``tag`` is done. Raises TransferFailed."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        select.select([transport.fileno()], [], [], 1.0)
        for completion in transport.poll(8):
            if completion.tag == tag and completion.status is Status.DONE:
                return
            raise TransferFailed(f"a read ended {completion.status}: {completion.detail}")
    raise TransferFailed(f"no completion within {DEADLINE_S:.0f} s")
