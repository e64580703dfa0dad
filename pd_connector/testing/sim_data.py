"""The simulated transport of one agent: reads copy what really lies in the owner's memory, torn over many steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pd_connector.protocol.events import Completed, Connect, Connected, GrantBlocks, PostRead
from pd_connector.testing.sim_slots import Fill, Staging
from pd_connector.testing.sim_truth import Holding, Piece, Watch
from pd_connector.transport.base import LeaseId
from pd_connector.transport.staging import Loan, Verdict

if TYPE_CHECKING:
    from pd_connector.testing.sim_node import Node

Sample = tuple[Piece, int, tuple[int, Holding | None]]
"""A piece, the content that was found there, and when and in whose hands."""


@dataclass(slots=True, eq=False)
class ReadJob:
    command: PostRead
    watch: Watch
    part: int
    rng: random.Random
    todo: list[Piece]
    ended: bool = False
    """Nothing of it writes any more."""
    flying: int = 0
    """Chunks between their start and their landing."""


@dataclass(slots=True, eq=False)
class Data:
    node: Node
    peers: dict[str, Node] = field(default_factory=dict)
    grants: dict[tuple[int, int], tuple[bytes, frozenset[tuple[int, int]]]] = field(default_factory=dict)
    jobs: dict[int, ReadJob] = field(default_factory=dict)
    closed: bool = False
    staging: Staging = field(init=False)
    _fences: int = 0

    def __post_init__(self) -> None:
        self.staging = Staging(self.node)

    # --- the owner's end ----------------------------------------------------------------------------------------------

    def grant(self, command: GrantBlocks) -> None:
        cells = frozenset((group, block) for group, blocks in command.blocks.items() for block in blocks)
        self.grants[command.number, command.epoch] = (command.capability, cells)

    def revoke(self, number: int, epoch: int) -> None:
        self.grants.pop((number, epoch), None)
        self.staging.revoke(LeaseId(number, epoch))

    def serves(self, job: ReadJob, pieces: list[Piece]) -> bool:
        command = job.command
        capability, cells = self.grants.get((command.number, command.epoch), (b"", frozenset()))
        groups = self.node.world.grid_groups
        return capability == command.capability and all(
            (groups[piece.source[0]], piece.source[1]) in cells for piece in pieces
        )

    # --- the reader's end ---------------------------------------------------------------------------------------------

    def connect(self, command: Connect) -> None:
        """The remote key is the owner's address and incarnation, as JSON would have it."""
        address, incarnation = command.transports["sim"].decode().split(" ")
        rng, rules = self.node.rng, self.node.world.script.rules
        fails = rng.random() < rules.connect_fails and not self.node.world.healed
        self.node.world.later(
            rng.uniform(1, 3) * rules.latency, self._connected, command.peer, address, incarnation, fails
        )

    def _connected(self, peer: str, address: str, incarnation: str, fails: bool) -> None:
        if self.closed:
            return
        target = self.node.world.hosts.get(address)
        if fails or target is None or str(target.incarnation) != incarnation:
            self.node.world.count("failed connects")
            self.node.feed(Connected(peer, error="the simulated connect failed"))
            return
        self.peers[peer] = target
        self.node.feed(Connected(peer, transport="sim"))

    def disconnect(self, peer: str) -> None:
        if self.peers.pop(peer, None) is not None:
            for job in list(self.jobs.values()):
                if job.command.peer == peer:
                    self._cancel(job)

    def post(self, command: PostRead) -> None:
        watch, part, plan = self.node.plans[id(command.plan)]
        rng = random.Random(f"{self.node.world.script.seed}/read/{watch.name}/{part}/{command.tag}")
        pieces = list(plan)
        rng.shuffle(pieces)
        job = self.jobs[command.tag] = ReadJob(command, watch, part, rng, pieces)
        if command.peer in self.peers:
            self.soon(job, self._start, job)
        else:
            self._complete(job, "peer_lost")

    def soon(self, job: ReadJob, what: object, *args: object) -> None:
        rules = self.node.world.script.rules
        self.node.world.later(rules.piece_time * job.rng.uniform(0.2, 1.8), what, *args)  # type: ignore[arg-type]

    def _source(self, job: ReadJob) -> Node | None:
        """Whose memory is read now: that of the incarnation that was connected, or of its successor."""
        target, world = self.peers.get(job.command.peer), self.node.world
        if target is None or not target.dead:
            return target
        return world.hosts.get(target.address) if world.script.rules.follow else None

    def _start(self, job: ReadJob) -> None:
        """One operation: permission is asked once, at its start; then it copies whatever lies there."""
        if job.ended or self.closed:
            return
        rules, world = self.node.world.script.rules, self.node.world
        source = self._source(job)
        if source is None:
            if job.rng.random() >= rules.death_hangs:
                self._complete(job, "peer_lost")
            else:
                world.count("reads hanging at a dead peer")
            return
        until = world.net.blocked_until(source.instance, self.node.instance)
        one_sided = rules.one_sided and not rules.slots  # it is the owner that fills slots
        if until or (source.frozen_until > world.now and not one_sided):
            world.count("reads held up")
            world.at(max(until, source.frozen_until) + 0.001, self._start, job)
            return
        pieces, job.todo = job.todo[: rules.chunk], job.todo[rules.chunk :]
        if not one_sided and not source.data.serves(job, pieces):
            self._complete(job, "not_granted")
            return
        job.flying += 1
        if rules.slots:
            source.data.staging.ask(Fill(self, job, pieces))
            return
        self.soon(job, self._sample, job, source, pieces)

    def _sample(self, job: ReadJob, source: Node, pieces: list[Piece]) -> None:
        world = self.node.world
        if source.dead:
            job.todo = pieces + job.todo
            job.flying -= 1
            self._start(job)
            return
        samples: list[Sample] = []
        for piece in pieces:
            grid, block = piece.source
            seen = (world.truth.tick(), source.engine.holder[block])
            samples.append((piece, source.memory[grid][block], seen))
        self.soon(job, self._land, job, samples)
        if job.todo:
            self._start(job)

    def _land(self, job: ReadJob, samples: list[Sample]) -> None:
        job.flying -= 1
        if job.ended or self.closed:
            return
        self._write(job, samples)
        if not job.todo and not job.flying:
            self._complete(job, "done")

    def _write(self, job: ReadJob, samples: list[Sample]) -> None:
        for piece, content, seen in samples:
            grid, block = piece.target
            if job.watch.audited and job.rng.random() < self.node.world.script.rules.wrong_bytes:
                self.node.world.count("pieces with wrong bytes")
                content ^= 2**62
            self.node.memory[grid][block] = content
            self.node.world.truth.landed(job.watch, job.part, piece, seen)

    # --- the reader's end, through slots ------------------------------------------------------------------------------

    def read_slot(self, fill: Fill, source: Node, loan: Loan[Fill], first: bool = True) -> None:
        """A slot is filled: read it piece by piece, while the next one is being filled. Without the owner's help."""
        job = fill.job
        if self.closed or source.dead:
            return
        if first and job.todo:
            self._start(job)
        if not job.ended and len(fill.samples) < len(fill.pieces):
            fill.samples.append(source.data.staging.read(loan, len(fill.samples)))
            self.soon(job, self.read_slot, fill, source, loan, False)
            return
        if not job.ended:
            read = zip(fill.pieces, fill.samples, strict=True)
            self._write(job, [(piece, content, seen) for piece, (content, seen) in read])
        self.soon(job, self._give_back, fill, source, loan)

    def _give_back(self, fill: Fill, source: Node, loan: Loan[Fill]) -> None:
        """What was read counts if the slot was held all the time."""
        world = self.node.world
        if self.closed or source.dead:
            return
        until = max(world.net.blocked_until(source.instance, self.node.instance), source.frozen_until)
        if until > world.now:
            world.at(until + 0.001, self._give_back, fill, source, loan)
            return
        verdict = source.data.staging.give_back(loan)
        if verdict is Verdict.HELD:
            self.soon(fill.job, self._land, fill.job, [])
        else:
            self.refused(fill, "not_granted" if verdict is Verdict.REVOKED else "error")

    def refused(self, fill: Fill, status: str) -> None:
        self._complete(fill.job, status)

    def again(self, fill: Fill) -> None:
        """The owner died: ask whoever is there now for all of it."""
        fill.job.todo = fill.pieces + fill.job.todo
        fill.job.flying -= 1
        self.soon(fill.job, self._start_over, fill.job)

    def _start_over(self, job: ReadJob) -> None:
        if job.todo:  # another of its chunks may have taken all of it
            self._start(job)

    def _complete(self, job: ReadJob, status: str) -> None:
        if job.ended or self.closed:
            return
        job.ended = True
        del self.jobs[job.command.tag]
        rules, world = self.node.world.script.rules, self.node.world
        if job.rng.random() < rules.completion_lost:
            world.count("completions lost")
            return
        event = Completed(job.command.tag, status, "simulated")
        delay = job.rng.expovariate(1 / rules.piece_time)
        world.later(delay, self.node.feed, event)
        if job.rng.random() < rules.completion_repeated:
            world.count("completions repeated")
            world.later(delay + job.rng.expovariate(2.0), self.node.feed, event)

    # --- settling -----------------------------------------------------------------------------------------------------

    def cancel(self, tag: int) -> None:
        if (job := self.jobs.get(tag)) is not None:
            self._cancel(job)

    def _cancel(self, job: ReadJob) -> None:
        rules = self.node.world.script.rules
        if job.rng.random() < rules.cancel_hangs:
            self.node.world.count("cancels hanging")  # until a fence: it goes on writing meanwhile
        else:
            self.node.world.later(job.rng.expovariate(0.2 / rules.piece_time), self._complete, job, "cancelled")

    def fence(self, peer: str, tag: int) -> None:
        jobs = [job for job in self.jobs.values() if job.command.peer == peer]
        delay = self.node.rng.uniform(0.5, 1.5) * self.node.world.script.rules.fence_time
        self.node.world.count("fences")
        self.node.world.later(delay, self._fenced, jobs, tag)

    def _fenced(self, jobs: list[ReadJob], tag: int) -> None:
        if self.closed:
            return
        for job in jobs:
            self._complete(job, "cancelled")
        self.node.world.later(0.001, self.node.feed, Completed(tag, "done"))

    def close(self) -> None:
        self.closed = True
        self.staging.die()
        self.jobs.clear()
        self.grants.clear()
