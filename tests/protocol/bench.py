"""A bench for protocol cores: a clock that tests move, a wire that they watch, no sleeping and nothing random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.protocol.context import Identity, Limits
from pd_connector.protocol.core import Core
from pd_connector.protocol.events import (
    Cancel,
    Command,
    Completed,
    Connect,
    Connected,
    Event,
    Fence,
    Grant,
    LeaseEnded,
    Note,
    Notify,
    PostRead,
    Pull,
    Received,
    Send,
    Tick,
    TransferEnded,
)
from pd_connector.protocol.messages import Endpoint, Message, decode, encode
from pd_connector.protocol.ticket import Ticket

CAPABILITY = bytes(range(16))
T = TypeVar("T")


def layout(packing: str = "plain", groups: int = 1, rank: int = 0) -> KVLayout:
    """Two grids per group."""
    form = Form(block_bytes=(64,), parts=(Part(name="kv", unit_bytes=4, token_stride=4, packing=packing),))
    group = GroupLayout(kind="full", block_tokens=16, dtype="f16", layers=("a", "b"), forms=(form,), form_of=(0, 0))
    return KVLayout(rank=rank, groups=(group,) * groups)


def plan(source: Sequence[int] = (1, 2), target: Sequence[int] = (7, 8), grids: Sequence[int] = (0, 1)) -> CopyPlan:
    return CopyPlan(coalesce(source, target), tuple(Pattern(grid, grid, 0, 0, 64) for grid in grids))


class Agent:
    """A core with its address; commands pile up in ``commands`` until a test takes them."""

    def __init__(self, bench: Bench, name: str, identity: Identity, limits: Limits) -> None:
        self.bench = bench
        self.name = name
        self.address = f"at-{name}"
        self.core = Core(identity, limits)
        self.commands: list[Command] = []
        self.notes: list[Note] = []
        self.sent: list[Message] = []

    @property
    def incarnation(self) -> int:
        return self.core.identity.incarnation

    def feed(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self.bench.now)
        for command in commands:
            match command:
                case Notify(note):
                    self.notes.append(note)
                case Send(_, message):
                    self.sent.append(message)
        self.commands.extend(commands)
        return commands

    def take(self, kind: type[T]) -> list[T]:
        """Commands of this kind that nobody took yet."""
        taken = [command for command in self.commands if isinstance(command, kind)]
        self.commands = [command for command in self.commands if not isinstance(command, kind)]
        return taken

    def said(self, kind: type[T]) -> list[T]:
        return [message for message in self.sent if isinstance(message, kind)]

    def noted(self, kind: type[T]) -> list[T]:
        return [note for note in self.notes if isinstance(note, kind)]

    # --- as an owner --------------------------------------------------------------------------------------------------

    def grant(self, number: int = 1, epoch: int = 1, readers: int = 1, **fields: Any) -> Ticket:
        """Lease blocks 1 to 4 of group 0; the ticket for them."""
        values = {"capability": CAPABILITY, "blocks": {0: (1, 2, 3, 4)}, "seconds": 30.0, "cap_seconds": 60.0} | fields
        self.feed(Grant(number=number, epoch=epoch, readers=readers, **values))
        return self.ticket(number, epoch)

    def ticket(self, number: int = 1, epoch: int = 1, **fields: Any) -> Ticket:
        values = {
            "address": self.address,
            "incarnation": self.incarnation,
            "lease": number,
            "epoch": epoch,
            "capability": CAPABILITY,
            "blocks": ((1, 2, 3, 4),),
        }
        return Ticket(**{**values, **fields})

    @property
    def lease_ends(self) -> list[tuple[int, int, str]]:
        return [(note.number, note.epoch, note.reason) for note in self.noted(LeaseEnded)]

    # --- as a reader --------------------------------------------------------------------------------------------------

    def pull(self, ticket: Ticket, *parts: CopyPlan, timeout: float = 20.0, **fields: Any) -> int:
        number = self.core.new_id()
        self.feed(Pull(number, ticket, tuple((part,) for part in parts or (plan(),)), timeout, **fields))
        return number

    def complete(self, status: str = "done", count: int | None = None) -> list[int]:
        """Answer the oldest posted reads (all of them); their tags."""
        reads = self.take(PostRead)
        count = len(reads) if count is None else count
        self.commands.extend(reads[count:])
        for read in reads[:count]:
            self.feed(Completed(read.tag, status, "bench"))
        return [read.tag for read in reads[:count]]

    def fenced(self, status: str = "done") -> None:
        for fence in self.take(Fence):
            self.feed(Completed(fence.tag, status))

    def cancelled(self) -> list[int]:
        tags = [command.tag for command in self.take(Cancel)]
        for tag in tags:
            self.feed(Completed(tag, "cancelled"))
        return tags

    def outcome(self, transfer: int) -> TransferEnded | None:
        """How a transfer ended; it must not have ended twice."""
        ends = [note for note in self.noted(TransferEnded) if note.transfer == transfer]
        assert len(ends) <= 1
        return ends[0] if ends else None

    def idle(self) -> bool:
        """Nothing held, waiting, or remembered as under way."""
        core, gauges = self.core, self.core.gauges()
        gauges.pop("peers")
        left = [core.reader._tags, core.reader._jobs, core.reader._fences, core.owner._jobs, core.owner._parked]
        waits = [session.waiting or session.active for session in core.reader.dialer.sessions.values()]
        return not (any(gauges.values()) or any(left) or any(waits) or len(core._context.timers))


class Bench:
    def __init__(self) -> None:
        self.now = 1000.0
        self.agents: dict[str, Agent] = {}
        self.lost: list[Message] = []
        self.drop: tuple[type[Message], ...] = ()
        """Kinds of messages that the wire loses."""
        self.connects = True
        """Whether Connect is answered at once."""
        self._boots = 0

    def agent(self, name: str, limits: Limits | None = None, **fields: Any) -> Agent:
        """An agent; under a name that is taken, the next incarnation at the same address."""
        self._boots += 1
        values = {"model": "m", "layout": layout(), "transports": {"t": b"reach me"}, "agent": name} | fields
        identity = Identity(**{"incarnation": 0x1000 + self._boots, **values})
        agent = Agent(self, name, identity, limits or Limits())
        self.agents[agent.address] = agent
        return agent

    def speaker(self, name: str, *ranks: Agent) -> Agent:
        directory = tuple(
            Endpoint(rank, agent.address, agent.incarnation, agent.core.identity.layout or layout())
            for rank, agent in enumerate(ranks)
        )
        return self.agent(name, layout=None, transports={}, directory=directory)

    def settle(self) -> None:
        """Carry frames (and answer Connect) until nothing is under way."""
        busy = True
        while busy:
            busy = False
            for agent in list(self.agents.values()):
                for send in agent.take(Send):
                    busy = True
                    self._carry(agent, send)
                for connect in agent.take(Connect) if self.connects else ():
                    busy = True
                    agent.feed(Connected(connect.peer, transport="t"))

    def _carry(self, agent: Agent, send: Send) -> None:
        frame = encode(send.message)
        message = decode(frame)
        target = self.agents.get(send.route.removeprefix("<"))
        if isinstance(message, self.drop) or target is None:
            self.lost.append(message)
        elif send.route.startswith("<"):
            target.feed(Received(agent.address, frame))
        else:
            target.feed(Received(f"<{agent.address}", frame))

    def wait(self, seconds: float, step: float = 0.05) -> None:
        """Let time pass, in steps; everybody's timers fire and frames travel."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            for agent in list(self.agents.values()):
                agent.feed(Tick())
            self.settle()

    def stop_the_clock_for(self, seconds: float) -> None:
        """Time passes and nobody notices: every process was stopped."""
        self.now += seconds


def ready_pair(bench: Bench, **limits: Any) -> tuple[Agent, Agent]:
    """An owner and a reader that have met: one pull is behind them."""
    owner, reader = bench.agent("p", Limits(**limits)), bench.agent("d", Limits(**limits))
    number = reader.pull(owner.grant(number=1))
    bench.settle()
    reader.complete()
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"
    for agent in (owner, reader):
        agent.commands.clear()
        agent.sent.clear()
        agent.notes.clear()
    return owner, reader
