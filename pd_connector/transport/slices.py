"""A read cut into slices: what one request asks for, small enough that cancel, fence and other reads never wait long.

A slice is block ids × *parts*; a part is a row (grid, byte offset in the block, bytes). Its byte stream runs part by
part, within a part block by block: both sides expand it alike, so no descriptor per chunk ever travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd_connector.plan import CopyPlan

SLICE_BYTES = 4 << 20
SLICE_CHUNKS = 8192
"""Bound on blocks × parts of one slice."""

Blocks = npt.NDArray[np.uint32]
Parts = npt.NDArray[np.int64]
"""Shape (n, 3), columns: grid in canonical order, byte offset within the block, bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    src_blocks: Blocks
    dst_blocks: Blocks
    src_parts: Parts
    dst_parts: Parts

    @property
    def num_bytes(self) -> int:
        return len(self.src_blocks) * int(self.src_parts[:, 2].sum())


def expand(first: Blocks, counts: Blocks) -> Blocks:
    """Block ids of runs given by their first id and length."""
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    steps = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
    return (np.repeat(first.astype(np.int64), counts) + steps).astype(np.uint32)


def compact(blocks: Blocks) -> Blocks:
    """The reverse of ``expand``: shape (n, 2), columns first id and count."""
    if not len(blocks):
        return np.zeros((0, 2), np.uint32)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(blocks.astype(np.int64)) != 1) + 1))
    counts = np.diff(np.concatenate((starts, [len(blocks)])))
    return np.stack((blocks[starts], counts), axis=1).astype(np.uint32)


def cut(plan: CopyPlan) -> Iterator[Slice]:
    """Slices of at most SLICE_BYTES and SLICE_CHUNKS each, in pattern order, lazily."""
    src, dst = (expand(plan.runs[:, side], plan.runs[:, 2]) for side in (0, 1))
    src_parts = np.array([(p.src_grid, p.src_offset, p.run_bytes) for p in plan.patterns], np.int64).reshape(-1, 3)
    dst_parts = np.array([(p.dst_grid, p.dst_offset, p.run_bytes) for p in plan.patterns], np.int64).reshape(-1, 3)
    blocks, index = len(src), 0
    while blocks and index < len(src_parts):
        run = int(src_parts[index, 2])
        fit = min(SLICE_BYTES // run, SLICE_CHUNKS)  # blocks of this part in one slice
        if fit == 0:
            yield from _cut_blocks(src, dst, src_parts[index], dst_parts[index])
            index += 1
        elif fit < blocks:
            for at in range(0, blocks, fit):
                one = slice(index, index + 1)
                yield Slice(src[at : at + fit], dst[at : at + fit], src_parts[one], dst_parts[one])
            index += 1
        else:
            sizes = np.cumsum(src_parts[index : index + SLICE_CHUNKS // blocks, 2]) * blocks
            some = slice(index, index + max(1, int(np.searchsorted(sizes, SLICE_BYTES, side="right"))))
            yield Slice(src, dst, src_parts[some], dst_parts[some])
            index = some.stop


def _cut_blocks(
    src: Blocks, dst: Blocks, src_part: npt.NDArray[np.int64], dst_part: npt.NDArray[np.int64]
) -> Iterator[Slice]:
    """A part so large that one block of it takes several slices."""
    for at in range(len(src)):
        for offset in range(0, int(src_part[2]), SLICE_BYTES):
            size = min(SLICE_BYTES, int(src_part[2]) - offset)
            yield Slice(
                src[at : at + 1],
                dst[at : at + 1],
                np.array([[src_part[0], src_part[1] + offset, size]], np.int64),
                np.array([[dst_part[0], dst_part[1] + offset, size]], np.int64),
            )
