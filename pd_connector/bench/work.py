"""What is moved: random blocks of a KV cache to random other blocks, every byte of which is compared afterwards."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.errors import TransferFailed
from pd_connector.memory import BlockGrid, Pool, Region, order_grids
from pd_connector.plan import CopyPlan, coalesce, whole_patterns

GRIDS = 56
"""28 layers x (K, V)."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Cache:
    """GRIDS grids of 2 x ``blocks`` blocks of ``chunk_bytes``: twice what one read moves, as in a cache."""

    def __init__(self, chunk_bytes: int, blocks: int, *, pooled: bool, huge: bool) -> None:
        self.chunk_bytes, self.blocks = chunk_bytes, blocks
        num_bytes = GRIDS * 2 * blocks * chunk_bytes
        if pooled:
            self.memory: Bytes = np.frombuffer(Pool(num_bytes), np.uint8)
        else:
            private = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            private.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
            self.memory = np.frombuffer(private, np.uint8)
        size = 2 * blocks * chunk_bytes
        grids = tuple(BlockGrid(0, grid, grid * size, chunk_bytes, chunk_bytes, 2 * blocks) for grid in range(GRIDS))
        self.region = Region(self.memory.ctypes.data, num_bytes, grids, keepalive=self.memory)
        if huge:
            self.region.populate()  # as an agent does with what is registered

    def fill(self) -> None:
        """Owner: every word differs."""
        words = self.memory.view(np.uint64)
        words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def poison(self) -> None:
        """Reader: nothing here is what an owner has."""
        self.memory[:] = 0xA5

    def touch(self) -> None:
        """Look at every page. Memory that was left alone for seconds was slow here at first, whoever used it."""
        self.memory[:: mmap.PAGESIZE].max()

    def by_block(self) -> Bytes:
        """Shape (grids, blocks, bytes)."""
        return self.memory.reshape(GRIDS, 2 * self.blocks, self.chunk_bytes)


class Work:
    """One read after the other into ``mine``; what the owner holds is known here without asking it."""

    def __init__(self, mine: Cache) -> None:
        self._mine = mine
        whole = Cache(mine.chunk_bytes, mine.blocks, pooled=False, huge=False)
        whole.fill()
        self._expected = whole.by_block()
        self._random = np.random.default_rng()
        self._patterns = whole_patterns(order_grids([mine.region]), 0)
        self._ids: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def draw(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(source, destination) block ids of a fresh read, into memory that holds none of its bytes."""
        everything = 2 * self._mine.blocks
        source, target = (self._random.permutation(everything)[: self._mine.blocks] for _ in range(2))
        self._ids = source, target
        self._mine.poison()
        return source, target

    def plan(self) -> CopyPlan:
        """``draw`` as a plan."""
        return CopyPlan(coalesce(*self.draw()), self._patterns)

    def check(self) -> None:
        """Raises TransferFailed unless every byte of the last read is right, and no other one was written."""
        assert self._ids is not None
        source, target = self._ids
        mine = self._mine.by_block()
        if not (mine[:, target] == self._expected[:, source]).all():
            raise TransferFailed("wrong bytes")
        others = np.setdiff1d(np.arange(2 * self._mine.blocks), target)
        if not (mine[:, others] == 0xA5).all():
            raise TransferFailed("bytes were written outside of the read's blocks")
