"""A thread that has a device move bytes in one direction, one job after the other, while others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

from pd_connector.transport.device import Device, Direction, Moves
from pd_connector.transport.worker import Worker

log = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 4.0

Job = Future[None]
Done = Callable[[str | None], None]
"""Told what went wrong, in words, or None."""


class Mover:
    """``report`` hands calls over to the thread that all of this belongs to; any other part runs in that thread."""

    def __init__(
        self, name: str, cpus: tuple[int, ...], direction: Direction, report: Callable[[Callable[[], None]], None]
    ) -> None:
        self._direction, self._report = direction, report
        self._jobs: set[Job] = set()
        self._worker = Worker(name, cpus)

    def start(self, device: Device, moves: Callable[[], Iterable[Moves]], done: Done) -> Job:
        """Move all of it, then report ``done``, once, whatever becomes of it. ``moves`` is called in our thread."""
        job = self._worker.submit(lambda: self._move(device, moves))
        self._jobs.add(job)
        job.add_done_callback(lambda ended: self._report(lambda: self._finish(ended, done)))
        return job

    def close(self) -> bool:
        """On return nothing moves any more; False when a device does not come back: then what it may still write to or
        read from must never be given away."""
        for job in self._jobs:
            job.cancel()
        stuck = wait(self._jobs, CLOSE_DEADLINE_S).not_done
        if stuck:
            log.error("a device did not end a move within %g s", CLOSE_DEADLINE_S)
        self._worker.close(wait=not stuck)
        return not stuck

    def _move(self, device: Device, moves: Callable[[], Iterable[Moves]]) -> None:
        for some in moves():
            device.move(some, self._direction)

    def _finish(self, job: Job, done: Done) -> None:
        self._jobs.discard(job)
        if job.cancelled():
            done("cancelled")
            return
        error = job.exception()
        done(None if error is None else f"{type(error).__name__}: {error}")
