"""Planner: what a pull wants, and which rank of the owner it is read from by which plans."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.layout import KVLayout
from pd_connector.memory import GridRef
from pd_connector.plan import CopyPlan, split_layers
from pd_connector.protocol.messages import Endpoint
from pd_connector.ranks import Duties, duties
from pd_connector.reshard import Resharding
from pd_connector.runtime.arguments import check_list, check_range

Ids = npt.NDArray[np.uint32]

_MAX_OWNERS = 256
"""Owners whose division of work is remembered."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens ``first`` to ``last - 1`` of one KV cache group, from ``source`` blocks that begin at token 0 into
    ``target`` blocks that begin at token ``start``. In blocks instead of tokens if not ``in_tokens``."""

    source: Ids
    target: Ids
    first: int
    last: int
    start: int
    in_tokens: bool
    to_the_end: bool = True
    """Whether these are the last tokens that the owner holds: nothing that matters lies behind them in their block."""


@dataclass(frozen=True, slots=True)
class Leg:
    """What is read from one rank of the owner. ``layers`` numbers the reader's layer of each part; all 0 where a part
    is everything."""

    rank: int
    readers: int
    parts: tuple[tuple[CopyPlan, ...], ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Owner:
    ranks: tuple[Endpoint, ...]
    duties: Duties
    reshardings: dict[int, Resharding]


class Planner:
    """For one agent's registered memory: ``grids`` in canonical order, ``layout`` what they mean."""

    def __init__(self, grids: Sequence[GridRef], layout: KVLayout) -> None:
        self._grids = grids
        self.layout = layout
        self._instance: tuple[KVLayout, ...] = (layout,)
        every = sorted({(ref.grid.group, ref.grid.layer) for ref in grids})
        self._numbers = {layer: index for index, layer in enumerate(every)}
        self._num_blocks: dict[int, int] = {}
        for ref in grids:
            known = self._num_blocks.get(ref.grid.group, ref.grid.num_blocks)
            self._num_blocks[ref.grid.group] = min(known, ref.grid.num_blocks)
        self._owners: OrderedDict[tuple[int, ...], _Owner] = OrderedDict()

    def num_blocks(self, group: int) -> int:
        """Raises LocalProtocolError for a group that is not registered."""
        if not 0 <= group < len(self.layout.groups):
            raise LocalProtocolError(f"KV cache group {group} is not registered here")
        # A pipeline stage may hold no layer of a group; its blocks are then only numbers here.
        return self._num_blocks.get(group, 2**32)

    def leasable(self, blocks: Sequence[npt.NDArray[np.uint32]]) -> dict[int, npt.NDArray[np.uint32]]:
        """Of the blocks per group, those of groups that we hold. Raises LocalProtocolError for ids beyond them."""
        for group, ids in enumerate(blocks):
            if len(ids) and ids.max() >= (limit := self.num_blocks(group)):
                raise LocalProtocolError(f"block {ids.max()} cannot be leased: group {group} has {limit} blocks")
        return {group: ids for group, ids in enumerate(blocks) if self.holds(group)}

    def holds(self, group: int) -> bool:
        """Whether this rank has memory of a group."""
        return group in self._num_blocks

    def join(self, instance: Sequence[KVLayout]) -> None:
        """Share the work with these ranks, ours among them. Raises LocalProtocolError."""
        if self.layout not in instance or len({layout.rank for layout in instance}) < len(instance):
            raise LocalProtocolError(
                "an instance has ranks of different numbers, and this agent's layout is one of them"
            )
        self._instance = tuple(instance)
        self._owners.clear()

    def demand(
        self,
        sources: Sequence[Ids],
        targets: Sequence[Ids],
        *,
        skip_blocks: int = 0,
        partial: bool = False,
        tokens: Sequence[tuple[int, int]] | None = None,
        held: int = 0,
    ) -> list[Demand]:
        """``targets`` are for the sources from ``skip_blocks`` on: all of them, or if ``partial`` as many as there are
        targets. With ``tokens``, a range per group, they are for these tokens instead, and begin with the block that
        holds the first; the owner holds ``held`` in all (0: it did not say). Raises LocalProtocolError for what cannot
        serve."""
        if len(targets) != len(sources):
            raise LocalProtocolError(f"the ticket has {len(sources)} KV cache groups, {len(targets)} were given")
        ranges = None if tokens is None else [check_range(each) for each in check_list("tokens", tokens)]
        if ranges is not None and len(ranges) != len(sources):
            raise LocalProtocolError(
                f"the ticket has {len(sources)} KV cache groups, {len(ranges)} token ranges were given"
            )
        out = []
        for group, (source, target) in enumerate(zip(sources, targets, strict=True)):
            self._check_target(group, target)
            if ranges is not None:
                first, last = ranges[group]
                size = self.layout.groups[group].block_tokens
                stateful = size == 1  # then the range counts blocks, not the ticket's tokens
                if (first == last and len(target)) or (held and last > held and not stateful):
                    raise LocalProtocolError(
                        f"tokens {first} to {last} of group {group} are not a range for these blocks"
                    )
                end = not held or last == held or stateful
                out.append(Demand(source, target, first, last, first // size * size, True, end))
                continue
            wanted = len(source) - skip_blocks
            if len(target) > wanted or (len(target) < wanted and not partial):
                raise LocalProtocolError(f"{max(wanted, 0)} source blocks but {len(target)} destination blocks")
            out.append(Demand(source, target, skip_blocks, skip_blocks + len(target), skip_blocks, False))
        return out

    def _check_target(self, group: int, target: Ids) -> None:
        limit, ids = self.num_blocks(group), np.sort(target)
        if len(ids) and ids[-1] >= limit:
            raise LocalProtocolError(f"destination block {ids[-1]} does not exist: group {group} has {limit}")
        if (ids[1:] == ids[:-1]).any():
            raise LocalProtocolError("a destination block is named twice in one transfer")

    def legs(
        self, owners: Sequence[Endpoint], demands: Sequence[Demand], by_layer: bool
    ) -> tuple[list[Leg], dict[int, int]]:
        """What to read from which rank; and the ranks whose lease this one ends without reading, with how many do.

        Raises LayoutMismatch, and LocalProtocolError for ids that do not fit the owner's block size."""
        owner = self._owner(owners)
        out = []
        unread = {rank: owner.duties.readers[rank] for rank in owner.duties.idle}
        for rank, resharding in owner.reshardings.items():
            plans = [plan for group, demand in enumerate(demands) for plan in self._plans(resharding, group, demand)]
            plans = [plan for plan in plans if plan.num_blocks and plan.patterns]
            if not plans:
                unread[rank] = owner.duties.readers[rank]
                continue
            parts = split_layers(plans, self._grids) if by_layer else [tuple(plans)]
            layers = self._layers(parts) if by_layer else (0,)
            out.append(Leg(rank, owner.duties.readers[rank], tuple(parts), layers))
        return out, unread

    def followed(
        self, owners: Sequence[Endpoint], demands: Sequence[Demand]
    ) -> tuple[list[Leg], dict[int, int], list[int]]:
        """As ``legs`` for a lease that grows, of whose blocks nothing is known: the legs have no parts. And the units
        of tokens, per group, whose ends are ends of blocks on both sides."""
        theirs = owners[0].layout.groups
        mine = self.layout.groups
        units = [math.lcm(mine[g].block_tokens, theirs[g].block_tokens) for g in range(len(demands))]
        counts = [-(-demand.last // units[g]) * units[g] // theirs[g].block_tokens for g, demand in enumerate(demands)]
        some = [
            replace(demand, source=np.arange(count, dtype=np.uint32))
            for demand, count in zip(demands, counts, strict=True)
        ]
        legs, unread = self.legs(owners, some, False)
        return [replace(leg, parts=()) for leg in legs], unread, units

    def part(self, owners: Sequence[Endpoint], rank: int, demands: Sequence[Demand]) -> tuple[CopyPlan, ...]:
        """What to read from one of the ranks."""
        resharding = self._owner(owners).reshardings[rank]
        plans = [plan for g, demand in enumerate(demands) for plan in self._plans(resharding, g, demand)]
        return tuple(plan for plan in plans if plan.num_blocks and plan.patterns)

    def _plans(self, resharding: Resharding, group: int, demand: Demand) -> list[CopyPlan]:
        first, last, start = demand.first, demand.last, demand.start
        size, theirs = (each.groups[group].block_tokens for each in (self.layout, resharding.theirs))
        if not demand.in_tokens:
            if size != theirs:
                raise LocalProtocolError(f"blocks of group {group}: {size} tokens here, {theirs} there: name tokens")
            first, last, start = first * size, last * size, start * size
        if first < last and demand.to_the_end:
            # The rest of the last block is nobody's on either side, and whole blocks are read in fewer pieces.
            last = min(-(-last // size) * size, -(-last // theirs) * theirs)
        return resharding.plan(group, demand.source, demand.target, first, last, 0, start)

    def _layers(self, parts: Sequence[Sequence[CopyPlan]]) -> tuple[int, ...]:
        grids = [self._grids[part[0].patterns[0].dst_grid].grid for part in parts]
        return tuple(self._numbers[grid.group, grid.layer] for grid in grids)

    def _owner(self, owners: Sequence[Endpoint]) -> _Owner:
        key = tuple(endpoint.incarnation for endpoint in owners)
        known = self._owners.get(key)
        if known is None or known.ranks != tuple(owners):  # nobody may leave a plan under another one's name
            layouts = {endpoint.rank: endpoint.layout for endpoint in owners}
            work = duties(self.layout.rank, self._instance, list(layouts.values()))
            made = {rank: Resharding(self.layout, layouts[rank], share) for rank, share in work.shares.items()}
            known = self._owners[key] = _Owner(tuple(owners), work, made)
            if len(self._owners) > _MAX_OWNERS:
                self._owners.popitem(last=False)
        return known
