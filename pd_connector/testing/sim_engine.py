"""The engine of one instance, as vLLM would be: it allocates blocks, leases them, pulls blocks, uses and frees them.

One engine speaks for all ranks of an instance: block ids are the same on every rank, blocks are free when every rank
has ended their lease, and a destination is free when every rank's pull has ended. Freed blocks are usually allocated
again and written over at once, which is what makes a premature free visible.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pd_connector.errors import LocalProtocolError
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.protocol.events import (
    Abort,
    BlocksReady,
    Close,
    Drained,
    Drop,
    End,
    Event,
    Extend,
    Forgo,
    Grant,
    Keep,
    LeaseEnded,
    LeaseRenewed,
    Note,
    PartConfirmed,
    Promised,
    Pull,
    TicketLost,
    TransferEnded,
)
from pd_connector.protocol.ticket import Ticket
from pd_connector.testing.sim_growth import Growth
from pd_connector.testing.sim_script import HandOver, Read
from pd_connector.testing.sim_truth import Cell, Holding, Violation, Watch, pieces_of

if TYPE_CHECKING:
    from pd_connector.testing.sim_node import Node
    from pd_connector.testing.sim_world import World


@dataclass(slots=True, eq=False)
class Lease:
    """A hand-over under one epoch, as its owner's engine sees it. ``open`` are the agents that have not ended it."""

    op: HandOver
    number: int
    epoch: int
    holding: Holding
    open: set[Node] = field(default_factory=set)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Its blocks per KV cache group."""
        rest = iter(self.holding.blocks)
        return tuple(tuple(next(rest) for _ in range(count)) for count in self.op.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What travels from engine to engine: the ticket, and beside it (for the truth alone) what it promises per rank."""

    ticket: Ticket
    promised: tuple[dict[Cell, int], ...]
    holding: Holding


@dataclass(slots=True, eq=False)
class Fetch:
    """One read of one instance: on each rank a pull from each owner rank that has something for it, into the same
    blocks. ``running`` counts the pulls that have not ended."""

    name: str
    holding: Holding
    running: int = 0


class Engine:
    def __init__(self, world: World, instance: int, ranks: list[Node], speaker: Node | None) -> None:
        self.world = world
        self.instance = instance
        self.ranks = ranks
        self.speaker = speaker
        self.front = speaker or ranks[0]
        self.dead = False
        self.drained = 0
        blocks = world.script.rules.blocks
        self.free = list(range(blocks))
        self.holder: list[Holding | None] = [None] * blocks
        self._holdings: set[Holding] = set()
        self._numbers = 0
        self._leases: dict[tuple[int, int], Lease] = {}
        self._pulls: dict[tuple[Node, int], tuple[Fetch, Watch]] = {}
        self.growth = Growth(self)

    def rng(self, *purpose: object) -> random.Random:
        return random.Random(f"{self.world.script.seed}/engine/{self.instance}/{purpose}")

    def later(self, delay: float, what: object, *args: object) -> None:
        """Call later, unless this engine died meanwhile; a frozen one does nothing before it thaws."""
        self.world.at(self.world.now + delay, self._if_alive, what, args)

    def _if_alive(self, what: object, args: tuple[object, ...]) -> None:
        thaw = self.front.frozen_until
        if not self.dead and thaw > self.world.now:
            self.world.at(thaw, self._if_alive, what, args)
        elif not self.dead:
            what(*args)  # type: ignore[operator]

    def nodes(self) -> list[Node]:
        return [*self.ranks, *([self.speaker] if self.speaker else [])]

    # --- blocks -------------------------------------------------------------------------------------------------------

    def take(self, name: str, count: int) -> Holding | None:
        if count > len(self.free):
            return None
        self.rng("take", name).shuffle(self.free)
        blocks, self.free = tuple(self.free[:count]), self.free[count:]
        return self._hold(name, blocks)

    def _hold(self, name: str, blocks: tuple[int, ...]) -> Holding:
        holding = Holding(name, blocks)
        self._holdings.add(holding)
        for block in blocks:
            assert self.holder[block] is None
            self.holder[block] = holding
        return holding

    def _write(self, node: Node, holding: Holding) -> None:
        for row in node.memory:
            for block in holding.blocks:
                row[block] = self.world.truth.new_content()

    def _free(self, holding: Holding) -> None:
        """The blocks are nobody's; mostly the next request has them, and writes, in the same instant."""
        self.world.truth.free(holding)
        self._holdings.discard(holding)
        for block in holding.blocks:
            self.holder[block] = None
        rng = self.rng("reuse", holding.name)
        if holding.name.startswith("reuse") or rng.random() < 0.2:
            self.free.extend(holding.blocks)
            return
        reuse = self._hold(f"reuse of {holding.name}", holding.blocks)
        for node in self.ranks:
            self._write(node, reuse)
        self.later(rng.expovariate(20.0), self._free, reuse)

    # --- owning -------------------------------------------------------------------------------------------------------

    def hand_over(self, op: HandOver) -> None:
        holding = self.take(f"{op.name}.1", sum(op.blocks))
        if holding is None:
            self.world.count("hand-overs without blocks")
            return
        self._numbers += 1
        self._lease(op, self._numbers, 1, holding)

    def _lease(self, op: HandOver, number: int, epoch: int, holding: Holding) -> None:
        lease = Lease(op, number, epoch, holding, set(self.nodes()))
        self._leases[number, epoch] = lease
        grows = op.growth is not None
        promised: tuple[dict[Cell, int], ...] = tuple({} for _ in self.ranks)
        for node, cells in zip(self.ranks, promised, strict=True):
            if not grows:
                self._write(node, holding)
                cells.update(
                    ((grid, block), row[block]) for grid, row in enumerate(node.memory) for block in holding.blocks
                )
        capability = self._capability(number) if not grows else self._promised(op)
        blocks = lease.groups()
        for node in self.nodes():
            seconds = op.cap if node is self.speaker else op.seconds
            leased = {} if node is self.speaker or grows else dict(enumerate(blocks))
            promise = self.growth.promise(lease) if grows and node is self.front else None
            growing = grows and node is not self.speaker
            limits = (len(op.reads), seconds, op.cap)
            grant = Grant(number, epoch, capability, leased, *limits, promise=promise, growing=growing)
            node.call(grant, op.grant_after)
        if grows:
            self.later(op.growth or 0.0, self.growth.grow, lease, promised)
        ticket = Ticket(
            address=self.front.address,
            incarnation=self.front.incarnation,
            lease=number,
            epoch=epoch,
            capability=capability,
            blocks=blocks,
            tokens=16 * len(holding.blocks),
        )
        offer = Offer(ticket, promised, holding)
        for index, read in enumerate(op.reads):
            name = f"{op.name}.{epoch}/{index}"
            self.world.later(read.ticket_after, self.world.deliver, read, name, offer)
        if op.extend_every is not None:
            self.later(op.extend_every, self._extend, lease)
        if op.end_after is not None and epoch == 1:
            self.later(op.end_after, self._take_back, lease)

    def _capability(self, number: int) -> bytes:
        who = self.front.name if self.world.script.rules.same_capabilities else f"{self.front.incarnation:x}"
        return random.Random(f"{self.world.script.seed}/capability/{who}/{number}").randbytes(16)

    def _promised(self, op: HandOver) -> bytes:
        """A broker makes a new one for each hand-over: that is what it is known by."""
        return random.Random(f"{self.world.script.seed}/capability/{op.name}").randbytes(16)

    def _extend(self, lease: Lease) -> None:
        if lease.open:
            for node in lease.open & set(self.ranks):
                node.call(Extend(lease.number))
            self.later(lease.op.extend_every or 1.0, self._extend, lease)

    def _take_back(self, lease: Lease) -> None:
        for node in lease.open:
            node.call(End(lease.number, "preempted", lease.op.resume and lease.epoch == 1))

    def _ended_at(self, lease: Lease, node: Node) -> None:
        if node not in lease.open:
            raise Violation("lease ended twice", f"{lease.op.name} at {node.name}")
        lease.open.discard(node)
        if node is self.speaker:
            self.world.later(0.002, self._take_back, lease)
        elif not lease.open & set(self.ranks):
            self._free(lease.holding)
            if self.speaker in lease.open:
                self.speaker.call(End(lease.number, "every rank ended it"))
        if not lease.open:
            del self._leases[lease.number, lease.epoch]
            if lease.op.resume and lease.epoch == 1:
                self.later(0.02, self._resume, lease)

    def _resume(self, lease: Lease) -> None:
        if (holding := self.take(f"{lease.op.name}.2", sum(lease.op.blocks))) is not None:
            self._lease(lease.op, lease.number, 2, holding)

    # --- reading ------------------------------------------------------------------------------------------------------

    def receive(self, read: Read, name: str, offer: Offer) -> None:
        """A request with a ticket arrives; it may wait in the queue, its lease kept, before it is scheduled."""
        if read.follow:
            self.growth.receive(read, name, offer)
            return
        if read.forge:
            offer = _falsified(offer, read.forge)
        if read.keep is None:
            self._start(read, name, offer, 20)
        else:
            self.front.call(Keep(offer.ticket, 2 * read.keep + 0.1))
            self.later(read.keep, self._scheduled, read, name, offer)

    def _scheduled(self, read: Read, name: str, offer: Offer) -> None:
        if read.forgo:
            reader = self.front.name if read.priority else ""
            self.front.call(Forgo(offer.ticket, reader))
            return
        self.front.call(Drop(offer.ticket))
        self._start(read, name, offer, 20)

    def _start(self, read: Read, name: str, offer: Offer, patience: int) -> None:
        count = sum(len(blocks) for blocks in offer.ticket.blocks)
        holding = self.take(f"{name} at {self.instance}", count)
        if holding is None:
            if patience:
                self.later(0.1, self._start, read, name, offer, patience - 1)
            else:
                self.world.count("reads without blocks")
                self.front.call(Forgo(offer.ticket))
            return
        legs = list(self.legs(len(offer.promised)))
        fetch = self.fetch(name, holding, len(legs))
        for node, rank, owner, share in legs:
            self._pull(read, offer, fetch, node, f"{name}.r{rank}.{owner}", owner, share)
        if read.again_after is not None:
            again = replace(read, again_after=None, keep=None, forge="")
            if not read.forge:
                self.later(read.again_after, self._start, again, f"{name}again", offer, 3)

    def legs(self, owners: int) -> Iterator[tuple[Node, int, int, tuple[int, int]]]:
        """Which of our ranks reads from which owner rank, and its share of the grids from it."""
        for rank, node in enumerate(self.ranks):
            for owner, share in _legs(rank, len(self.ranks), owners):
                yield node, rank, owner, share

    def fetch(self, name: str, holding: Holding, pulls: int) -> Fetch:
        return Fetch(name, holding, pulls)

    def watch(self, node: Node, number: int, fetch: Fetch, watch: Watch) -> None:
        self._pulls[node, number] = (fetch, watch)
        self.world.count("pulls")

    def _pull(
        self, read: Read, offer: Offer, fetch: Fetch, node: Node, name: str, owner: int, share: tuple[int, int]
    ) -> None:
        parts = tuple(self._parts(offer.ticket, fetch.holding, read.layerwise, share)) or ((),)
        pieces = [tuple(piece for plan in part for piece in pieces_of(plan)) for part in parts]
        forged = bool(read.forge)
        watch = Watch(name, pieces, offer.promised[owner], None if forged else offer.holding, read.audit)
        number = node.core.new_id()
        for index, part in enumerate(parts):
            for plan in part:
                node.plans[id(plan)] = (watch, index, tuple(pieces_of(plan)))
        self.watch(node, number, fetch, watch)
        readers = max(1, -(-(len(self.ranks) - owner) // len(offer.promised)))
        pull = Pull(number, offer.ticket, parts, read.timeout, owner, readers, read.priority, read.audit)
        node.call(pull)
        if read.abort_after is not None:
            node.call_later(read.abort_after, Abort(number))

    def _parts(
        self, ticket: Ticket, holding: Holding, layerwise: bool, share: tuple[int, int]
    ) -> Iterator[tuple[CopyPlan, ...]]:
        """One part for everything, one per group, or one per layer of each group. ``share``: every so many-th grid."""
        rest, grid, whole = list(holding.blocks), 0, []
        for group, source in enumerate(ticket.blocks):
            target, rest = rest[: len(source)], rest[len(source) :]
            runs = coalesce(source, target)
            grids = range(grid, grid + self.world.script.rules.grids[group])
            grid = grids.stop
            patterns = tuple(Pattern(one, one, 0, 0, 64) for one in grids if one % share[1] == share[0])
            if layerwise:
                yield from ((CopyPlan(runs, (pattern,)),) for pattern in patterns)
            elif patterns:
                whole.append(CopyPlan(runs, patterns))
        if ticket.lease % 2 and not layerwise:
            yield tuple(whole)
        else:
            yield from ((plan,) for plan in whole)

    def _ended_pull(self, node: Node, note: TransferEnded) -> None:
        if (node, note.transfer) not in self._pulls:
            raise Violation("unknown transfer ended", f"{note.transfer} at {node.name}")
        fetch, watch = self._pulls[node, note.transfer]
        self.world.truth.ended(watch, note.outcome, node.memory)
        calm = self.world.script.rules.calm
        self.world.count("calm transfers" if calm else f"transfers {note.outcome}")
        if calm and note.outcome != "done":
            raise Violation("no progress", f"{watch.name} ended {note.outcome} in a calm world: {note.error}")
        self._quiet(fetch)

    def _quiet(self, fetch: Fetch) -> None:
        fetch.running -= 1
        if not fetch.running:
            self._free(fetch.holding)

    # --- what the agents say ------------------------------------------------------------------------------------------

    def notified(self, node: Node, note: Note) -> None:
        match note:
            case TransferEnded():
                self._ended_pull(node, note)
            case BlocksReady():
                self.growth.more(node, note)
            case Promised():
                self.growth.promised(note)
            case PartConfirmed(transfer, part):
                if (node, transfer) not in self._pulls:
                    raise Violation("unknown transfer confirmed", f"{transfer} at {node.name}")
                self.world.truth.confirmed(self._pulls[node, transfer][1], part, node.memory)
            case LeaseEnded(number, epoch):
                lease = self._leases.get((number, epoch))
                if lease is None:
                    raise Violation("lease ended twice", f"lease {number}.{epoch} at {node.name}")
                self._ended_at(lease, node)
            case LeaseRenewed(number, epoch):
                if node is self.speaker and (lease := self._leases.get((number, epoch))) is not None:
                    for rank in lease.open & set(self.ranks):
                        rank.call(Extend(number), 0.002)
            case TicketLost():
                self.world.count("tickets lost")
            case Drained():
                self.drained += 1
                if self.drained > len(self.nodes()):
                    raise Violation("drained twice", node.name)

    def refused(self, node: Node, event: Event, error: LocalProtocolError) -> None:
        """A local call broke a rule of the library, or one of its bounds."""
        self.world.count("local calls refused")
        if isinstance(event, Grant):
            lease = self._leases[event.number, event.epoch]
            self._ended_at(lease, node)
            self._take_back(lease)
        elif isinstance(event, Pull):
            fetch, watch = self._pulls.pop((node, event.transfer))
            watch.outcome = "refused"
            if self.world.script.rules.calm:
                raise Violation("no progress", f"{watch.name} was refused in a calm world: {error}")
            self._quiet(fetch)
        else:
            raise Violation("crash", f"{node.name} refused {event}: {error}")

    # --- death and the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        for node in self.nodes():
            node.feed(Close())

    def die(self) -> None:
        """Whatever it held is gone with its memory."""
        self.dead = True
        for node in self.nodes():
            node.die()
        for holding in self._holdings:
            holding.freed = self.world.truth.tick()

    def check_idle(self) -> None:
        if self._holdings or self._leases:
            names = [holding.name for holding in self._holdings] + [lease.op.name for lease in self._leases.values()]
            raise Violation("unfinished", f"instance {self.instance} still holds {', '.join(names)}")
        if running := [watch.name for _, watch in self._pulls.values() if not watch.outcome]:
            raise Violation("unfinished", f"instance {self.instance} still pulls {', '.join(running)}")
        for node in self.nodes():
            node.check_idle()


def _legs(rank: int, readers: int, owners: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Which owner ranks a reader's rank reads from, and its share of the grids from each."""
    if owners < readers:
        yield rank % owners, (0, 1)
        return
    mine = range(rank, owners, readers)
    for index, owner in enumerate(mine):
        yield owner, (index, len(mine))


def _falsified(offer: Offer, what: str) -> Offer:
    ticket = offer.ticket
    wrong: dict[str, dict[str, object]] = {
        "incarnation": {"incarnation": ticket.incarnation ^ 1},
        "capability": {"capability": bytes(byte ^ 255 for byte in ticket.capability)},
        "epoch": {"epoch": ticket.epoch + 7},
    }
    fields = {name: getattr(ticket, name) for name in ticket.__struct_fields__}
    return replace(offer, ticket=Ticket(**{**fields, **wrong[what]}))
