"""Test memory whose every byte is known: regions of block grids, filled from a seed, alike in every process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.memory import BlockGrid, MemoryKind, Pool, Region, order_grids
from pd_connector.plan import CopyPlan

Bytes = npt.NDArray[np.uint8]

POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Placed:
    """Memory for a region: where transports find it, and its bytes as a test sees them (another mapping of the same
    memory, where the first is a device's)."""

    address: int
    array: Bytes
    kind: MemoryKind = MemoryKind.HOST
    keepalive: Any = None


def private(num_bytes: int) -> Placed:
    array = np.empty(num_bytes, np.uint8)
    return Placed(array.ctypes.data, array, keepalive=array)


def pooled(num_bytes: int) -> Placed:
    array = np.frombuffer(Pool(num_bytes), np.uint8)[:num_bytes]
    return Placed(array.ctypes.data, array, keepalive=array)


PRIVATE, POOLED = f"{__name__}:private", f"{__name__}:pooled"


class Arena:
    """One array per region, where the function ``memory`` ("module:name", so that other processes find it too) has
    placed it. ``regions`` lists the grids of each; a region ends where its last grid does."""

    def __init__(self, regions: Sequence[Sequence[BlockGrid]], seed: int, memory: str = PRIVATE) -> None:
        module, _, name = memory.partition(":")
        place: Callable[[int], Placed] = getattr(import_module(module), name)
        rng = np.random.default_rng(seed)
        placed = [place(max(grid.end for grid in grids)) for grids in regions]
        self.arrays = [each.array for each in placed]
        for array in self.arrays:
            array[:] = rng.integers(0, 256, array.nbytes, np.uint8)
        self.regions = [
            Region(each.address, each.array.nbytes, tuple(grids), each.kind, each.keepalive)
            for each, grids in zip(placed, regions, strict=True)
        ]
        self.grids = order_grids(self.regions)

    def poison(self) -> None:
        for array in self.arrays:
            array[:] = POISON

    def snapshot(self) -> list[Bytes]:
        return [array.copy() for array in self.arrays]

    def same(self, expected: Sequence[Bytes]) -> bool:
        return all(np.array_equal(array, other) for array, other in zip(self.arrays, expected, strict=True))

    def chunk(self, arrays: Sequence[Bytes], grid: int, block: int, offset: int, size: int) -> Bytes:
        """A view into ``arrays`` (ours or a snapshot): bytes of one block of one grid, found the plain way."""
        ref = self.grids[grid]
        start = ref.grid.offset + block * ref.grid.block_stride + offset
        return arrays[ref.region][start : start + size]

    def expect(self, plan: CopyPlan, source: Arena, before: Sequence[Bytes]) -> list[Bytes]:
        """What a plan must make of memory that held ``before``: one chunk at a time, the slow and obvious way."""
        after = [array.copy() for array in before]
        for pattern in plan.patterns:
            for src, dst, count in plan.runs.tolist():
                for step in range(count):
                    here, there = dst + step * plan.dst_step, src + step * plan.src_step
                    for place in itertools.product(*(range(dim.times) for dim in pattern.dims)):
                        at = [
                            sum(index * dim[side] for index, dim in zip(place, pattern.dims, strict=True))
                            for side in (1, 2)
                        ]
                        target = self.chunk(
                            after, pattern.dst_grid, here, pattern.dst_offset + at[1], pattern.run_bytes
                        )
                        target[:] = source.chunk(
                            source.arrays, pattern.src_grid, there, pattern.src_offset + at[0], pattern.run_bytes
                        )
        return after


def _mixed() -> list[list[BlockGrid]]:
    """Small, odd, interleaved, gapped and large blocks of two groups over three regions."""
    blocks = 48
    return [
        [
            BlockGrid(0, 0, 64, 4096, 4096, blocks),
            BlockGrid(0, 1, 64 + blocks * 4096, 5000, 4096, blocks),
            BlockGrid(1, 0, 64 + blocks * 9096, 1001, 1001, blocks),
        ],
        [BlockGrid(0, 2, 0, 8192, 4096, blocks), BlockGrid(0, 2, 4096, 8192, 4096, blocks)],
        [BlockGrid(0, 3, 0, 65536, 65536, blocks), BlockGrid(1, 1, blocks * 65536 + 7, 40000, 40000, blocks)],
    ]


MIXED = _mixed()
BIG = [[BlockGrid(0, 0, 0, 1 << 20, 1 << 20, 64)]]
HUGE_BLOCKS = [[BlockGrid(0, 0, 0, 9 * (1 << 20) + 5, 9 * (1 << 20) + 5, 3)]]

GEOMETRIES = {"mixed": MIXED, "big": BIG, "huge_blocks": HUGE_BLOCKS}
