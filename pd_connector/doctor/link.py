"""One transport to one peer, used directly: how long it takes to connect and to read."""

from __future__ import annotations

import select
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from pd_connector.bench.work import Cache, Work
from pd_connector.errors import PDError, TransferFailed
from pd_connector.plan import CopyPlan, Pattern
from pd_connector.transport.base import LeaseId, PeerId, Status, Transport

LEASE, CAPABILITY = LeaseId(1, 1), b"pdc doctor's own"
"""Of all test memory everywhere, so that no message need carry them. They are no secret: there is nothing but a pattern
to read, and whoever can greet its owner may."""
CHUNK_BYTES = 65536
BLOCKS = 8
"""Per grid of the test memory, twice that lie in it: 28 MiB are read of 56 MiB."""
SMALL_BYTES = 4096
_CONNECT_S = 5.0
_READ_S = 30.0
_LARGE_READS, _LARGE_S = 5, 1.0
_SMALL_READS, _SMALL_S = 200, 0.3

_tags = count(1)


@dataclass(frozen=True)
class Figures:
    """10**9 bytes per second of scattered blocks, and microseconds of one small read; medians."""

    gbps: float
    latency_us: float


class Target:
    """Memory here that is read into, of the same shape as the test memory of ``pdc doctor --serve``."""

    def __init__(self) -> None:
        self.cache = Cache(CHUNK_BYTES, BLOCKS, pooled=False, huge=True)
        self.work = Work(self.cache)


class Link:
    """A started transport, and the peer that it reads from."""

    def __init__(self, transport: Transport, peer: PeerId) -> None:
        self._transport, self._peer = transport, peer

    def connect(self, remote: bytes) -> float:
        """Seconds until a read could be posted. Raises TransferFailed."""
        return self._timed(_CONNECT_S, "connecting", lambda tag: self._transport.connect(self._peer, remote, tag))

    def read(self, plan: CopyPlan) -> float:
        """Seconds from the post to the completion. Raises TransferFailed."""
        post = self._transport.post_read
        return self._timed(_READ_S, "reading", lambda tag: post(self._peer, LEASE, CAPABILITY, plan, tag))

    def measure(self, target: Target) -> Figures:
        """Read from test memory that its owner filled, into ``target``, which is registered. Raises TransferFailed, for
        wrong bytes too."""
        large: list[float] = []
        end = time.monotonic() + _LARGE_S
        while len(large) <= _LARGE_READS and (not large or time.monotonic() < end):
            plan = target.work.plan()
            large.append(self.read(plan))
            self._check(target)
        # The first one finds pages that were never touched; over a slow network there may be no other.
        seconds = statistics.median(large[1:] or large)
        return Figures(plan.num_bytes / seconds / 1e9, self._latency(target, plan) * 1e6)

    def _check(self, target: Target) -> None:
        try:
            target.work.check()
        except TransferFailed as error:
            raise TransferFailed(f"{self._transport.name}: {error}: do not use it, and report it") from error

    def _latency(self, target: Target, plan: CopyPlan) -> float:
        """Seconds of the start of one block. ``plan`` has just put the right bytes where they go."""
        run = np.array([[*plan.runs[0, :2], 1]], np.uint32)
        small = CopyPlan(run, (Pattern(0, 0, 0, 0, SMALL_BYTES),))
        here = target.cache.by_block()[0, int(run[0, 1]), :SMALL_BYTES]
        expected = here.copy()
        here[:] = 0
        times: list[float] = []
        end = time.monotonic() + _SMALL_S
        while len(times) < _SMALL_READS and (not times or time.monotonic() < end):
            times.append(self.read(small))
        if not (here == expected).all():
            raise TransferFailed(f"{self._transport.name}: wrong bytes in a small read: do not use it, and report it")
        return statistics.median(times)

    def _timed(self, seconds: float, stage: str, post: Callable[[int], None]) -> float:
        tag = next(_tags)
        start = time.perf_counter()
        try:
            post(tag)
        except PDError as error:
            raise TransferFailed(f"{stage}: {error}") from error
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            select.select([self._transport.fileno()], [], [], left)
            for completion in self._transport.poll(8):
                if completion.tag != tag:
                    continue  # of an attempt that was given up
                if completion.status is not Status.DONE:
                    raise TransferFailed(f"{stage} ended {completion.status}: {completion.detail}")
                return time.perf_counter() - start
        raise TransferFailed(f"{stage} did not end within {seconds:g} s: does a firewall let this port through?")
