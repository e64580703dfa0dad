"""Registered local memory: regions of bytes and the block grids that lie in them.

A *region* is one contiguous range of addresses. A *block grid* says where the blocks of one layer (or of one of its
K/V parts) lie inside a region: block ``i`` starts at ``region.address + offset + i * block_stride`` and has
``block_bytes`` bytes. Several grids may share a region; those of one group never overlap, those of several groups may:
engines give each block of such a region to one group at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from pd_connector.errors import LocalProtocolError

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 2, 4, 16
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_HUGE = 2 << 20
_PIECE = 64 << 20
"""Bytes between two looks whether to go on; a multiple of _HUGE."""


UNKNOWN = -1
"""Number of a device."""


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
    """One contiguous range of registered memory. ``keepalive`` is whatever object owns the bytes. Memory that is not
    ``writable`` can be leased, but nothing can be pulled into it. ``dma_buf`` is a descriptor of a dma-buf that the
    region lies in, and where in it: how devices of one host reach the memory of another. ``device`` is the number of
    the one that memory of another kind than HOST lies on (UNKNOWN: its driver is asked)."""

    address: int
    length: int
    grids: tuple[BlockGrid, ...]
    kind: MemoryKind = MemoryKind.HOST
    keepalive: Any = field(default=None, repr=False)
    writable: bool = True
    dma_buf: tuple[int, int] | None = None
    device: int = UNKNOWN

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


@cache
def native() -> ModuleType | None:
    """The C extension, or None where it was not built."""
    try:
        return import_module("pd_connector._native")
    except ImportError:
        return None


def copier() -> Callable[[Any, Any], None]:
    """``copy(destination, source)`` of bytes between contiguous buffers of one length: the C extension's, which keeps
    clear of the caches (17 to 27 GB/s a thread of an AMD Zen 4 against 3 to 13 by memcpy), or else numpy's."""
    extension = native()
    found: Callable[[Any, Any], None] = np.copyto if extension is None else extension.copy
    return found


def shared_pool(num_bytes: int) -> Pool:
    """Zeroed host memory that readers on this host map and copy from directly, rounded up to whole pages.

    A writable buffer: ``numpy.frombuffer(pool, dtype)`` and ``torch.frombuffer(pool, dtype=dtype)`` make arrays of it
    and keep it alive. Raises LocalProtocolError for a size that cannot be had."""
    return Pool(num_bytes)


class Pool(mmap.mmap):
    """Memory in a memfd: ``len(pool)`` bytes at ``address``; ``fd`` is the memfd's descriptor."""

    fd: int
    address: int

    def __new__(cls, length: int) -> Pool:
        if length < 1:
            raise LocalProtocolError(f"a pool of {length} bytes: it needs at least one")
        whole = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("pd-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, whole)
            pool = super().__new__(cls, fd, whole)
            # From here on only mappings made before may write: readers get the bytes, never the power over them.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            with contextlib.suppress(OSError):  # before Linux 5.1
                fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except (OSError, OverflowError, ValueError) as error:
            os.close(fd)
            raise LocalProtocolError(f"a pool of {length} bytes: {error}") from error
        pool.fd = fd
        pool.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(pool))
        weakref.finalize(pool, os.close, fd)
        _pools[pool.address] = pool
        return pool


_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


def pool_at(address: int, length: int) -> Pool | None:
    """The pool that this range lies in, if it lies in one."""
    for reference in _pools.valuerefs():  # a list of its own, whatever other threads make meanwhile
        pool = reference()
        if pool is None or pool.closed:
            continue
        if pool.address <= address and address + length <= pool.address + len(pool):
            return pool
    return None


@dataclass(frozen=True, slots=True)
class GridRef:
    """A grid together with the region it lies in (``region`` is an index into a list of regions)."""

    region: int
    grid: BlockGrid


def order_grids(regions: Sequence[Region]) -> tuple[GridRef, ...]:
    """All grids in the canonical order (group, layer, then as registered), which both sides of a plan count by."""
    refs = [GridRef(index, grid) for index, region in enumerate(regions) for grid in region.grids]
    return tuple(sorted(refs, key=lambda ref: (ref.grid.group, ref.grid.layer)))
