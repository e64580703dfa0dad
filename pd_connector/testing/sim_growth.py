"""Leases that grow while their blocks are computed, and reads that follow them: the streamed hand-over, simulated.

An owner computes one block of the first group per step and says so; other groups are ready with the last one, as those
whose blocks an engine frees on the way. Blocks that were not computed hold what their last holder left there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.protocol.events import (
    Abort,
    Append,
    BlocksReady,
    Disclaim,
    Expect,
    Forgo,
    Grow,
    Promise,
    Promised,
    Pull,
)
from pd_connector.protocol.ticket import Ticket
from pd_connector.testing.sim_script import Read
from pd_connector.testing.sim_truth import Watch, pieces_of

if TYPE_CHECKING:
    from pd_connector.testing.sim_engine import Engine, Fetch, Lease, Offer
    from pd_connector.testing.sim_node import Node


@dataclass(slots=True, eq=False)
class _Leg:
    """A pull of one rank that follows: what it knows of the owner's blocks, and how far it has planned."""

    watch: Watch
    share: tuple[int, int]
    targets: tuple[tuple[int, ...], ...]
    sources: list[list[int]]
    planned: list[int] = field(default_factory=list)


class Growth:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._world = engine.world
        self._awaited: dict[bytes, list[tuple[Read, str, Offer]]] = {}
        self._legs: dict[tuple[Node, int], _Leg] = {}

    # --- owning -------------------------------------------------------------------------------------------------------

    @staticmethod
    def promise(lease: Lease) -> Promise:
        return Promise(16 * len(lease.holding.blocks), lease.op.name.encode(), len(lease.op.blocks))

    def grow(self, lease: Lease, promised: tuple[dict[tuple[int, int], int], ...], done: int = 0) -> None:
        """Compute the next block and tell the agents; they are told of blocks that are not computed yet, too."""
        engine, op, groups = self._engine, lease.op, lease.groups()
        if not lease.open & set(engine.ranks) or lease.holding.freed is not None:
            return
        last = done + 1 >= len(groups[0])
        fresh = list(groups[0][done : done + 1]) + [block for each in groups[1:] if last for block in each]
        for node, cells in zip(engine.ranks, promised, strict=True):
            for grid, row in enumerate(node.memory):
                for block in fresh:
                    row[block] = cells[grid, block] = self._world.truth.new_content()
        ahead = max(step + 1 + engine.rng("ahead", op.name, step).randint(0, 2) for step in range(done + 1))
        named = (groups[0][:ahead], *(each if last else () for each in groups[1:]))
        tokens = (min(done + 1, len(groups[0])), *(len(each) if last else 0 for each in groups[1:]))
        for node in lease.open & set(engine.ranks):
            node.call(Grow(lease.number, dict(enumerate(named)), tokens, last), op.grant_after)
        if not last:
            engine.later(op.growth or 0.0, self.grow, lease, promised, done + 1)

    # --- reading ------------------------------------------------------------------------------------------------------

    def receive(self, read: Read, name: str, offer: Offer) -> None:
        """A request arrives of which only address and capability are known."""
        engine, ticket = self._engine, offer.ticket
        if read.forgo:
            engine.front.call(Disclaim(ticket.address, ticket.capability, True))
            return
        self._awaited.setdefault(ticket.capability, []).append((read, name, offer))
        engine.front.call(Expect(ticket.address, ticket.capability, read.timeout))

    def promised(self, note: Promised) -> None:
        for read, name, offer in self._awaited.pop(note.capability, ()):
            if note.ticket is None:
                self._world.count("leases not promised")
            elif note.ticket.epoch != offer.ticket.epoch:
                self._world.count("leases promised under another epoch")
            else:
                self._start(read, name, offer, note.ticket, 20)

    def _start(self, read: Read, name: str, offer: Offer, ticket: Ticket, patience: int) -> None:
        engine = self._engine
        counts = [len(group) for group in offer.ticket.blocks]
        holding = engine.take(f"{name} at {engine.instance}", sum(counts))
        if holding is None:
            if patience:
                engine.later(0.1, self._start, read, name, offer, ticket, patience - 1)
            else:
                engine.front.call(Forgo(ticket))
            return
        rest = iter(holding.blocks)
        targets = tuple(tuple(next(rest) for _ in range(count)) for count in counts)
        legs = list(engine.legs(len(offer.promised)))
        fetch = engine.fetch(name, holding, len(legs))
        for node, rank, owner, share in legs:
            self._follow(read, offer, ticket, fetch, node, f"{name}.r{rank}.{owner}", owner, share, targets)

    def _follow(
        self, read: Read, offer: Offer, ticket: Ticket, fetch: Fetch, node: Node, name: str, owner: int,
        share: tuple[int, int], targets: tuple[tuple[int, ...], ...],
    ) -> None:  # fmt: skip
        engine = self._engine
        wanted = {(grid, block) for grid, group in self._grids(share) for block in targets[group]}
        watch = Watch(name, [], offer.promised[owner], offer.holding, read.audit, wanted)
        number = node.core.new_id()
        self._legs[node, number] = _Leg(watch, share, targets, [[] for _ in targets], [0] * len(targets))
        engine.watch(node, number, fetch, watch)
        readers = max(1, -(-(len(engine.ranks) - owner) // len(offer.promised)))
        node.call(Pull(number, ticket, (), read.timeout, owner, readers, read.priority, read.audit, follow=True))
        if read.abort_after is not None:
            node.call_later(read.abort_after, Abort(number))

    def _grids(self, share: tuple[int, int]) -> list[tuple[int, int]]:
        groups = self._world.grid_groups
        return [(grid, group) for grid, group in enumerate(groups) if grid % share[1] == share[0]]

    def more(self, node: Node, note: BlocksReady) -> None:
        leg = self._legs[node, note.transfer]
        plans = []
        for group, news in enumerate(note.blocks):
            leg.sources[group] += map(int, news)
            first, last = leg.planned[group], note.tokens[group]
            leg.planned[group] = max(first, last)
            grids = [grid for grid, of in self._grids(leg.share) if of == group]
            if last > first and grids:
                runs = coalesce(leg.sources[group][first:last], leg.targets[group][first:last])
                plans.append(CopyPlan(runs, tuple(Pattern(grid, grid, 0, 0, 64) for grid in grids)))
        part = len(leg.watch.parts)
        leg.watch.parts.append(tuple(piece for plan in plans for piece in pieces_of(plan)))
        for plan in plans:
            node.plans[id(plan)] = (leg.watch, part, tuple(pieces_of(plan)))
        node.call(Append(note.transfer, tuple(plans), note.complete))
