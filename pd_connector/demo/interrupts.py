"""Ctrl-C, SIGTERM and a closed terminal: each ends the demo at once, and none at a moment that leaks a process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, the signals raise KeyboardInterrupt in the main thread."""

    def __init__(self) -> None:
        self._held = 0
        self._wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal takes effect at the end of the block: between a process's birth and the moment we know of it, and
        while everything is being stopped, there must be none."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.check()

    def check(self) -> None:
        """Raise what came while held, or what foreign code swallowed: imports and callbacks may."""
        if self._wanted and not self._held:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        self.check()
