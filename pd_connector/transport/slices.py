"""A read cut into slices: what one request asks for, small enough that cancel, fence and other reads never wait long.

A slice is block ids × *parts*; a part is (grid, byte offset in the block, bytes). Its byte stream runs part by part,
within a part block by block: both sides expand it alike, so no descriptor per chunk ever travels.

A slice is handled while its bytes wash everything else out of the caches, where a numpy call costs tens of
microseconds. Hence plain tuples for parts, of which there are few, and arrays only for blocks and chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd_connector.plan import CopyPlan

SLICE_BYTES = 2 << 20
SLICE_CHUNKS = 8192
"""Bound on blocks × parts of one slice."""
SLICE_PARTS = 1024

Blocks = npt.NDArray[np.uint32]
Part = tuple[int, int, int]
"""Grid in canonical order, byte offset within the block, bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    src_blocks: Blocks
    dst_blocks: Blocks
    src_parts: tuple[Part, ...]
    dst_parts: tuple[Part, ...]
    num_bytes: int


def expand(first: Blocks, counts: Blocks) -> Blocks:
    """Block ids of runs given by their first id and length."""
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    steps = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
    return (np.repeat(first.astype(np.int64), counts) + steps).astype(np.uint32)


def cut(plan: CopyPlan) -> Iterator[Slice]:
    """Slices within the three bounds above, in pattern order, lazily."""
    src, dst = (expand(plan.runs[:, side], plan.runs[:, 2]) for side in (0, 1))
    src_parts = tuple((p.src_grid, p.src_offset, p.run_bytes) for p in plan.patterns)
    dst_parts = tuple((p.dst_grid, p.dst_offset, p.run_bytes) for p in plan.patterns)
    blocks, index = len(src), 0
    while blocks and index < len(src_parts):
        size = src_parts[index][2]
        fit = min(SLICE_BYTES // size, SLICE_CHUNKS)  # blocks of this part in one slice
        if fit == 0:
            yield from _cut_blocks(src, dst, src_parts[index], dst_parts[index])
            index += 1
        elif fit < blocks:
            parts = src_parts[index : index + 1], dst_parts[index : index + 1]
            for at in range(0, blocks, fit):
                some = src[at : at + fit], dst[at : at + fit]
                yield Slice(*some, *parts, len(some[0]) * size)
            index += 1
        else:
            stop, total = index, 0
            most = index + min(SLICE_PARTS, SLICE_CHUNKS // blocks)
            while stop < min(len(src_parts), most) and total + blocks * src_parts[stop][2] <= SLICE_BYTES:
                total += blocks * src_parts[stop][2]
                stop += 1
            yield Slice(src, dst, src_parts[index:stop], dst_parts[index:stop], total)
            index = stop


def _cut_blocks(src: Blocks, dst: Blocks, src_part: Part, dst_part: Part) -> Iterator[Slice]:
    """A part so large that one block of it takes several slices."""
    for at in range(len(src)):
        for offset in range(0, src_part[2], SLICE_BYTES):
            size = min(SLICE_BYTES, src_part[2] - offset)
            source = (src_part[0], src_part[1] + offset, size)
            target = (dst_part[0], dst_part[1] + offset, size)
            yield Slice(src[at : at + 1], dst[at : at + 1], (source,), (target,), size)
