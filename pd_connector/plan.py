"""Copy plans: which bytes of which blocks go where, in a form whose size is the number of runs, not of blocks.

A *run* is a stretch of blocks that advance evenly on both sides: (source block, destination block, count). A *pattern*
says, for one pair of grids, which bytes of every block of every run are read. Runs are never expanded per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import GridRef

Ids = Sequence[int] | npt.NDArray[Any]
"""A flat list of block ids."""
Runs = npt.NDArray[np.uint32]
"""Shape (n, 3), columns: first source block, first destination block, number of blocks."""
MAX_DIMS = 3
"""Of a pattern: heads, tokens and chunks at the most."""


class Dim(NamedTuple):
    """A repetition inside a block: so many times, so many bytes further on each side."""

    times: int
    src_stride: int
    dst_stride: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """``run_bytes`` bytes at ``src_offset`` of every source block go to ``dst_offset`` of its destination block, and
    again for every place of ``dims`` (outermost first; none: once).

    ``src_grid`` and ``dst_grid`` count the grids of each side in canonical order (memory.order_grids).
    """

    src_grid: int
    dst_grid: int
    src_offset: int
    dst_offset: int
    run_bytes: int
    dims: tuple[Dim, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        return self.run_bytes * math.prod(dim.times for dim in self.dims)

    def place(self, side: int) -> Place:
        """The source (0) or the destination (1)."""
        grid, offset = ((self.src_grid, self.src_offset), (self.dst_grid, self.dst_offset))[side]
        return Place(grid, offset, self.run_bytes, tuple((dim.times, dim[1 + side]) for dim in self.dims))

    @property
    def src_span(self) -> int:
        """Bytes from the first to behind the last one that is read of a block."""
        return self.run_bytes + sum((dim.times - 1) * dim.src_stride for dim in self.dims)

    @property
    def dst_span(self) -> int:
        return self.run_bytes + sum((dim.times - 1) * dim.dst_stride for dim in self.dims)


class Place(NamedTuple):
    """One side of a pattern: ``run_bytes`` at ``offset`` of every block of a grid, and again for every (count, stride)
    of ``dims``, outermost first."""

    grid: int
    offset: int
    run_bytes: int
    dims: tuple[tuple[int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        return self.run_bytes * math.prod(count for count, _ in self.dims)

    @property
    def span(self) -> int:
        """Bytes from the first to behind the last one."""
        return self.run_bytes + sum((count - 1) * stride for count, stride in self.dims)


class Side(NamedTuple):
    """What a plan touches on one side: every place in every block."""

    blocks: npt.NDArray[np.uint32]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """Every pattern is applied to every run. Within a run each side advances by its step from block to block."""

    runs: Runs
    patterns: tuple[Pattern, ...]
    src_step: int = 1
    dst_step: int = 1

    @property
    def num_blocks(self) -> int:
        """Blocks the plan writes on the reader's side (each counted once, over all patterns)."""
        return int(self.runs[:, 2].sum(dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * sum(p.num_bytes if p.dims else p.run_bytes for p in self.patterns)

    def side(self, side: int) -> Side:
        """The source (0) or the destination (1), in the same order."""
        return Side(self.blocks(side), tuple(pattern.place(side) for pattern in self.patterns))

    def blocks(self, side: int) -> npt.NDArray[np.uint32]:
        """Block ids in order: of the source (``side`` 0) or the destination (1)."""
        return expand(self.runs[:, side], self.runs[:, 2], (self.src_step, self.dst_step)[side])


def expand(first: Runs, counts: Runs, step: int = 1) -> npt.NDArray[np.uint32]:
    """Block ids of runs given by their first id and length."""
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    steps = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
    return (np.repeat(first.astype(np.int64), counts) + steps * step).astype(np.uint32)


def coalesce(src_blocks: Ids, dst_blocks: Ids) -> Runs:
    """Merge pairs of block ids that advance together into as few runs as there can be, in order of destination.

    The order in which blocks are read means nothing, and engines hand freed blocks out again last one first.
    Raises LocalProtocolError when the lists differ in length, hold ids outside 0..2**32-1 or name a destination twice
    (two writers of one block could leave either one's bytes).
    """
    src = block_ids(src_blocks, "source")
    dst = block_ids(dst_blocks, "destination")
    if len(src) != len(dst):
        raise LocalProtocolError(f"{len(src)} source blocks but {len(dst)} destination blocks")
    if not len(src):
        return np.zeros((0, 3), np.uint32)
    order = np.argsort(dst, kind="stable")  # linear in ids that rise or fall
    src, dst = src[order], dst[order]
    if (dst[1:] == dst[:-1]).any():
        raise LocalProtocolError("a destination block is named twice in one transfer")
    return merge(src, dst)


def merge(src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], src_step: int = 1, dst_step: int = 1) -> Runs:
    """Runs of pairs in the order given; they are not checked."""
    breaks = np.flatnonzero((src[1:] - src[:-1] != src_step) | (dst[1:] - dst[:-1] != dst_step))
    runs = np.empty((len(breaks) + 1, 3), np.uint32)
    starts = np.concatenate(([0], breaks + 1))
    runs[:, 0], runs[:, 1] = src[starts], dst[starts]
    runs[:-1, 2] = starts[1:] - starts[:-1]
    runs[-1, 2] = len(src) - starts[-1]
    return runs


def whole_patterns(grids: Sequence[GridRef], group: int) -> tuple[Pattern, ...]:
    """Whole blocks of a group, between memories that are laid out alike."""
    sizes = ((index, ref.grid.block_bytes) for index, ref in enumerate(grids) if ref.grid.group == group)
    return tuple(Pattern(index, index, 0, 0, size) for index, size in sizes)


def split_layers(plans: Sequence[CopyPlan], grids: Sequence[GridRef]) -> list[tuple[CopyPlan, ...]]:
    """The plans of each layer of the reader, in layer order, so that each can complete on its own."""
    layers: dict[tuple[int, int], list[CopyPlan]] = {}
    for plan in plans:
        by_layer: dict[tuple[int, int], list[Pattern]] = {}
        for pattern in plan.patterns:
            grid = grids[pattern.dst_grid].grid
            by_layer.setdefault((grid.group, grid.layer), []).append(pattern)
        for layer, patterns in by_layer.items():
            one = CopyPlan(plan.runs, tuple(patterns), plan.src_step, plan.dst_step)
            layers.setdefault(layer, []).append(one)
    return [tuple(plans) for _, plans in sorted(layers.items())]


def block_ids(blocks: Ids, side: str) -> npt.NDArray[np.int64]:
    """Block ids as an array. Raises LocalProtocolError for anything but a flat list of integers in 0..2**32-1."""
    ids: npt.NDArray[Any] = np.asarray(blocks)
    if ids.dtype == np.uint32 and ids.ndim == 1:
        return ids.astype(np.int64)
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise LocalProtocolError(f"{side} blocks must be a flat list of integers")
    if int(ids.min()) < 0 or int(ids.max()) >= 2**32:
        raise LocalProtocolError(f"{side} block ids must lie in 0..2**32-1, got {int(ids.min())}..{int(ids.max())}")
    return ids.astype(np.int64)
