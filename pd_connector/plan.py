"""Pure planning: which bytes of which blocks go where, in a form whose size is the number of runs, not of blocks.

A *run* is a stretch of blocks that is consecutive on both sides: (source block, destination block, count). A *pattern*
says, for one pair of grids, which bytes of every block of every run are read. Nothing here is expanded per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import GridRef

Ids = Sequence[int] | npt.NDArray[Any]
"""A flat list of block ids."""
Runs = npt.NDArray[np.uint32]
"""Shape (n, 3), columns: first source block, first destination block, number of blocks."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """``run_bytes`` bytes at ``src_offset`` of every source block go to ``dst_offset`` of its destination block.

    ``src_grid`` and ``dst_grid`` count the grids of each side in canonical order (memory.order_grids).
    """

    src_grid: int
    dst_grid: int
    src_offset: int
    dst_offset: int
    run_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """Every pattern is applied to every run."""

    runs: Runs
    patterns: tuple[Pattern, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks the plan writes on the reader's side (each counted once, over all patterns)."""
        return int(self.runs[:, 2].sum(dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * sum(pattern.run_bytes for pattern in self.patterns)


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
    breaks = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(src)])))
    return np.stack((src[starts], dst[starts], counts), axis=1).astype(np.uint32)


class WholeBlocks:
    """Plans whole blocks of one group between two ranks of equal layout (``grids``: the reader's, canonical order).

    What does not depend on the blocks is made once. Raises LocalProtocolError for a group that is not there."""

    def __init__(self, grids: Sequence[GridRef], group: int) -> None:
        mine = [(index, ref.grid) for index, ref in enumerate(grids) if ref.grid.group == group]
        if not mine:
            raise LocalProtocolError(f"KV cache group {group} is not registered here")
        self._group = group
        self._patterns = tuple(Pattern(index, index, 0, 0, grid.block_bytes) for index, grid in mine)
        self.num_blocks = min(grid.num_blocks for _, grid in mine)

    def plan(self, src_blocks: Ids, dst_blocks: Ids) -> CopyPlan:
        """Raises LocalProtocolError, as ``coalesce`` does and for a destination that does not exist."""
        dst = block_ids(dst_blocks, "destination")
        if len(dst) and (highest := int(dst.max())) >= self.num_blocks:
            raise LocalProtocolError(
                f"destination block {highest} does not exist: group {self._group} has {self.num_blocks}"
            )
        return CopyPlan(coalesce(src_blocks, dst), self._patterns)


def split_layers(plan: CopyPlan, grids: Sequence[GridRef]) -> list[CopyPlan]:
    """One plan per layer of the reader, in layer order, so that each can complete on its own."""
    by_layer: dict[tuple[int, int], list[Pattern]] = {}
    for pattern in plan.patterns:
        grid = grids[pattern.dst_grid].grid
        by_layer.setdefault((grid.group, grid.layer), []).append(pattern)
    return [CopyPlan(plan.runs, tuple(patterns)) for _, patterns in sorted(by_layer.items())]


def block_ids(blocks: Ids, side: str) -> npt.NDArray[np.int64]:
    """Block ids as an array. Raises LocalProtocolError for anything but a flat list of integers in 0..2**32-1."""
    ids: npt.NDArray[Any] = np.asarray(blocks)
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise LocalProtocolError(f"{side} blocks must be a flat list of integers")
    if int(ids.min()) < 0 or int(ids.max()) >= 2**32:
        raise LocalProtocolError(f"{side} block ids must lie in 0..2**32-1, got {int(ids.min())}..{int(ids.max())}")
    return ids.astype(np.int64)
