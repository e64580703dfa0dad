"""Planner: block ids of one pull → the plans that are posted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import GridRef
from pd_connector.plan import CopyPlan, WholeBlocks, split_layers

Ids = npt.NDArray[np.uint32]


class Planner:
    """For one agent's registered memory: ``grids`` in canonical order."""

    def __init__(self, grids: Sequence[GridRef]) -> None:
        self._grids = grids
        self._groups: dict[int, WholeBlocks] = {}

    def group(self, group: int) -> WholeBlocks:
        """Raises LocalProtocolError for a group that is not registered."""
        if group not in self._groups:
            self._groups[group] = WholeBlocks(self._grids, group)
        return self._groups[group]

    def parts(
        self, sources: Sequence[Ids], targets: Sequence[Ids], skip_blocks: int, partial: bool, by_layer: bool
    ) -> list[CopyPlan]:
        """One plan per group, or per layer. ``targets`` are for the sources from ``skip_blocks`` on: all of them, or if
        ``partial`` as many as there are targets. Raises LocalProtocolError for ids that do not fit."""
        if len(targets) != len(sources):
            raise LocalProtocolError(f"the ticket has {len(sources)} KV cache groups, {len(targets)} were given")
        plans = []
        for group, (source, target) in enumerate(zip(sources, targets, strict=True)):
            wanted = source[skip_blocks : skip_blocks + len(target) if partial else None]
            plan = self.group(group).plan(wanted, target)
            plans.extend(split_layers(plan, self._grids) if by_layer else [plan])
        return plans
