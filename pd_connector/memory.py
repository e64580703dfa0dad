"""Registered local memory: regions of bytes and the block grids that lie in them.

A *region* is one contiguous range of addresses. A *block grid* says where the blocks of one layer (or of one of its
K/V parts) lie inside a region: block ``i`` starts at ``region.address + offset + i * block_stride`` and has
``block_bytes`` bytes. Several grids may share a region; grids never overlap.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pd_connector.errors import LocalProtocolError

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_HUGE = 2 << 20
_PIECE = 64 << 20
"""Bytes between two looks whether to go on; a multiple of _HUGE."""


class MemoryKind(StrEnum):
    HOST = "host"
    CUDA = "cuda"
    NPU = "npu"


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Where the blocks of one layer part lie. All sizes in bytes, ``layer`` and ``group`` are indices."""

    group: int
    layer: int
    offset: int
    block_stride: int
    block_bytes: int
    num_blocks: int

    def __post_init__(self) -> None:
        if min(self.group, self.layer, self.offset) < 0 or min(self.block_bytes, self.num_blocks) < 1:
            raise LocalProtocolError(f"{self}: indices must not be negative, sizes must be at least 1")
        if self.block_stride < self.block_bytes:
            raise LocalProtocolError(f"{self}: blocks overlap, block_stride must be at least block_bytes")

    @property
    def end(self) -> int:
        """First byte offset in the region that this grid does not use."""
        return self.offset + (self.num_blocks - 1) * self.block_stride + self.block_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One contiguous range of registered memory. ``keepalive`` is whatever object owns the bytes."""

    address: int
    length: int
    grids: tuple[BlockGrid, ...]
    kind: MemoryKind = MemoryKind.HOST
    keepalive: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.address <= 0 or self.length <= 0:
            raise LocalProtocolError(f"region at {self.address:#x} of {self.length} bytes: not a valid range")
        for grid in self.grids:
            if grid.end > self.length:
                raise LocalProtocolError(f"{grid} ends at byte {grid.end}, its region has only {self.length}")

    def view(self) -> memoryview:
        """Writable bytes of a host region; the view keeps the owner of the memory alive."""
        if self.kind is not MemoryKind.HOST:
            raise LocalProtocolError(f"a {self.kind} region has no host view")
        buffer = (ctypes.c_ubyte * self.length).from_address(self.address)
        # libzmq may still hold a frame after the region was unregistered: the buffer itself must pin the owner.
        buffer.keepalive = self.keepalive  # type: ignore[attr-defined]
        return memoryview(buffer).cast("B")

    def populate(self, going: Callable[[], bool] = lambda: True) -> None:
        """Fault every page of a host region in, keeping its contents, and gather the pages into huge ones, so that the
        first read into it is as fast as the later ones and copies do not wait for the page tables (235 MB took 21 to 33
        ms instead of 55 to 62). What the kernel cannot do (populate before Linux 5.14, collapse before 6.1, huge pages
        switched off) stays undone. Takes about a second per GiB and stops early when ``going`` says no."""
        if self.kind is not MemoryKind.HOST:
            return
        start = self.address // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(self.address + self.length) // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = ctypes.CDLL(None).madvise
        for at in range(start // _PIECE * _PIECE, end, _PIECE):
            if not going():
                return
            low, high = max(at, start), min(at + _PIECE, end)
            # Collapsing waits for a worker thread of the kernel on every CPU: not for what holds no huge page.
            huge = high // _HUGE > -(-low // _HUGE)
            for advice in (_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE) if huge else (_MADV_POPULATE_WRITE,):
                advise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), advice)


@dataclass(frozen=True, slots=True)
class GridRef:
    """A grid together with the region it lies in (``region`` is an index into a list of regions)."""

    region: int
    grid: BlockGrid


def order_grids(regions: Sequence[Region]) -> tuple[GridRef, ...]:
    """All grids in the canonical order (group, layer, then as registered), which both sides of a plan count by."""
    refs = [GridRef(index, grid) for index, region in enumerate(regions) for grid in region.grids]
    return tuple(sorted(refs, key=lambda ref: (ref.grid.group, ref.grid.layer)))
