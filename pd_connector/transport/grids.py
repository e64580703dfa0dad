"""The grids of registered memory, of whatever kind: which addresses of a peer and which plans of ours lie in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import Region, order_grids
from pd_connector.plan import MAX_DIMS, CopyPlan, Pattern
from pd_connector.transport.slices import Part


class GridTable:
    def __init__(self, regions: Sequence[Region]) -> None:
        self._refs = order_grids(regions)
        self._grids = [ref.grid for ref in self._refs]

    def groups(self, parts: Iterable[Part]) -> set[int]:
        """KV cache groups that these parts belong to."""
        return {self._grids[grid].group for grid, _, _ in parts}

    def fault(self, last_block: int, parts: Iterable[Part]) -> str | None:
        """What is wrong with an address, or None; nothing else here checks."""
        for index, offset, size in parts:
            if not 0 <= index < len(self._grids):
                return f"grid {index} does not exist, there are {len(self._grids)}"
            grid = self._grids[index]
            if offset < 0 or size < 1 or offset + size > grid.block_bytes:
                return f"{size} bytes at {offset} do not lie in the blocks of grid {index} ({grid.block_bytes} bytes)"
            if last_block >= grid.num_blocks:
                return f"block {last_block} does not exist, grid {index} has {grid.num_blocks}"
        return None

    def check_plan(self, plan: CopyPlan) -> None:
        """Raises LocalProtocolError unless every destination byte of the plan lies in a block registered here and its
        source is one that some owner could have."""
        runs = plan.runs
        if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.uint32:
            raise LocalProtocolError(f"runs must be uint32 of shape (n, 3), got {runs.dtype} of {runs.shape}")
        if not len(runs) or not plan.patterns:
            return
        if int(runs[:, 2].min()) < 1:
            raise LocalProtocolError("a run of a plan has no blocks")
        if any(map(_impossible, plan.patterns)) or min(plan.src_step, plan.dst_step) < 1:
            raise LocalProtocolError("a pattern of the plan has an impossible source grid, offset or dimension")
        # The highest id is enough, and costs nothing like expanding a run of 2**32 blocks.
        wide = runs.astype(np.int64)
        if int((wide[:, 0] + (wide[:, 2] - 1) * plan.src_step).max()) >= 2**32:
            raise LocalProtocolError("a run of the plan ends beyond block 2**32-1 of its source")
        last = int((wide[:, 1] + (wide[:, 2] - 1) * plan.dst_step).max())
        fault = self.fault(last, [(p.dst_grid, p.dst_offset, p.dst_span) for p in plan.patterns])
        if fault is not None:
            raise LocalProtocolError(f"the plan does not fit the memory registered here: {fault}")
        limit = min(self._grids[pattern.dst_grid].num_blocks for pattern in plan.patterns)
        if plan.num_blocks > limit:
            raise LocalProtocolError(f"the plan writes {plan.num_blocks} blocks into {limit}: one is named twice")


def _impossible(pattern: Pattern) -> bool:
    sizes = [pattern.src_grid, pattern.src_offset, *(value for dim in pattern.dims for value in dim)]
    counts = [dim.times for dim in pattern.dims]
    return (
        len(counts) > MAX_DIMS
        or min(sizes) < 0
        or min(counts, default=1) < 1
        or pattern.num_bytes > pattern.dst_span  # more would be written over
        or max(pattern.src_grid, pattern.src_offset, pattern.src_span, pattern.num_bytes) >= 2**48
    )
