"""The work of one rival process: its memory, the blocks of one request, the check, and JSON lines with the benchmark.

Runs in a rival's own environment, so it needs numpy and nothing of pd_connector. What is moved is what
benchmarks/bench_transport.py moves: GRIDS grids of twice as many blocks as one request reads.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

GRIDS = 56
POISON = 0xA5
PROGRESS_CALLS = 64  # between two looks for a message
PR_SET_PDEATHSIG = 1
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Setup:
    """The first line that a process is sent; ``peer`` is the owner's metadata, for the reader."""

    chunk: int
    blocks: int
    huge: bool
    scope: str
    address: str
    tuned: bool
    peer: dict[str, Any]

    @property
    def chunks(self) -> int:
        """Chunks of the whole memory."""
        return GRIDS * 2 * self.blocks


def allocate(setup: Setup) -> Bytes:
    """Private memory, as the caches of an engine are."""
    private = mmap.mmap(-1, setup.chunks * setup.chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE if setup.huge else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(private, np.uint8)


def fill(memory: Bytes) -> None:
    """Make every chunk differ."""
    words = memory.view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Request:
    """The same random blocks of every grid, in order of destination, as chunk numbers within the whole memory."""

    source: np.ndarray[Any, np.dtype[np.int64]]
    target: np.ndarray[Any, np.dtype[np.int64]]


class Destination:
    """The reader's memory and what it is to hold."""

    def __init__(self, setup: Setup, memory: Bytes) -> None:
        self._setup = setup
        self._memory = memory.reshape(setup.chunks, setup.chunk)
        expected = np.empty_like(memory)
        fill(expected)
        self._expected = expected.reshape(self._memory.shape)

    def request(self, seed: int) -> Request:
        """Other random blocks for every seed; the destination is poisoned."""
        blocks = self._setup.blocks
        rng = np.random.default_rng(seed)
        source = rng.permutation(2 * blocks)[:blocks]
        target = np.sort(rng.permutation(2 * blocks)[:blocks])
        starts = np.arange(GRIDS)[:, None] * 2 * blocks
        self._memory[:] = POISON
        return Request((starts + source).ravel(), (starts + target).ravel())

    def verify(self, request: Request) -> bool:
        """Whether every byte of the request arrived."""
        return bool((self._memory[request.target] == self._expected[request.source]).all())


def cpu_clock(pid: int) -> int:
    """The clock of another process's CPU time, to the nanosecond; see clock_getcpuclockid(3)."""
    return (~pid << 3) | 2


def measured(read: Callable[[], None], owner: int) -> dict[str, float]:
    """Seconds of a read and the CPU seconds of this process and the owner's in it."""
    clocks = (cpu_clock(os.getpid()), cpu_clock(owner))
    used = sum(map(time.clock_gettime, clocks))
    start = time.perf_counter()
    read()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu_s": sum(map(time.clock_gettime, clocks)) - used}


class Line:
    """JSON lines over stdin and stdout. Whatever else writes to stdout, as the rivals do, goes to stderr instead."""

    def __init__(self) -> None:
        # A stopped process must not outlive a benchmark that was killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._pending = b""

    def setup(self) -> Setup:
        return Setup(**next(self.messages()))

    def send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def messages(self, progress: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
        """Messages until the benchmark says ``quit`` or goes away; ``progress`` is called over and over in between."""
        while True:
            while b"\n" not in self._pending:
                if progress:
                    for _ in range(PROGRESS_CALLS):
                        progress()
                    if not select.select([0], [], [], 0)[0]:
                        continue
                received = os.read(0, 65536)
                if not received:
                    return
                self._pending += received
            line, self._pending = self._pending.split(b"\n", 1)
            message = json.loads(line)
            if message.get("quit"):
                return
            yield message


def run(owner: Callable[[Line, Setup], None], reader: Callable[[Line, Setup], None]) -> None:
    """Play the role named on the command line, then leave without the exit handlers, in which NIXL may crash."""
    line = Line()
    role = {"owner": owner, "reader": reader}[sys.argv[1]]
    role(line, line.setup())
    os._exit(0)


def touch_all(line: Line, memory: Bytes, progress: Callable[[], None] | None = None) -> None:
    """Owner: look at every page whenever told to, as bench.work.Cache.touch says, and answer."""
    for _ in line.messages(progress):
        memory[:: mmap.PAGESIZE].max()
        line.send({})


def read_all(line: Line, setup: Setup, memory: Bytes, prepare: Callable[[Request], Callable[[], None]]) -> None:
    """Answer every ``read`` with its time and CPU. ``prepare`` gives the call that posts a request and waits for it.

    Descriptor lists are built before the clock starts, although a user pays for them with every request: this favours
    the rivals.
    """
    destination = Destination(setup, memory)
    for message in line.messages():
        request = destination.request(message["read"])
        figures = measured(prepare(request), setup.peer["pid"])
        line.send({**figures, "verified": destination.verify(request)})
