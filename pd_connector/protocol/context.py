"""What the owner's and the reader's half of the core share: identity, limits, timers, counters and the outbox."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pd_connector.layout import KVLayout
from pd_connector.protocol.events import Command, Note, Notify, Send
from pd_connector.protocol.messages import Endpoint, Message
from pd_connector.protocol.timers import Timers


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and waits of one agent. Seconds unless named otherwise."""

    max_leases: int = 16384
    max_transfers: int = 4096
    max_transfers_per_peer: int = 64
    max_sessions: int = 1024
    max_guests: int = 1024
    max_parked: int = 1024  # requests for leases that are not granted yet
    max_digest_jobs: int = 64
    max_remembered: int = 65536  # verdicts, ended leases and capabilities that are over
    remember: float = 120.0
    park: float = 2.0
    awaited: float = 5.0  # whoever awaits a lease and does not ask again within is forgotten
    ask: float = 1.0  # between questions for a lease that is not granted yet
    hello: float = 5.0
    retry: float = 0.5
    settle: float = 2.0  # a cancelled read may take this long before its peer is fenced
    fence: float = 10.0
    renew: float = 5.0  # between renewals while the owner has not yet said how long a lease lasts
    window: int = 2  # parts of one transfer that are read at the same time


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is. ``layout`` and ``transports`` are empty for an agent without memory; ``directory`` lists the
    ranks that it speaks for."""

    agent: str
    incarnation: int
    model: str = ""
    layout: KVLayout | None = None
    transports: dict[str, bytes] = field(default_factory=dict)
    directory: tuple[Endpoint, ...] = ()


class Context:
    def __init__(self, identity: Identity, limits: Limits) -> None:
        self.identity = identity
        self.limits = limits
        self.timers = Timers()
        self.counters: Counter[str] = Counter()
        self.draining = False
        self._out: list[Command] = []
        self._last_id = 0

    @property
    def incarnation(self) -> int:
        return self.identity.incarnation

    def new_id(self) -> int:
        """Transfers, tags and jobs share one sequence per incarnation."""
        self._last_id += 1
        return self._last_id

    def emit(self, command: Command) -> None:
        self._out.append(command)

    def send(self, route: str, message: Message) -> None:
        self._out.append(Send(route, message))

    def notify(self, note: Note) -> None:
        self._out.append(Notify(note))

    @property
    def has_commands(self) -> bool:
        return bool(self._out)

    def take(self) -> list[Command]:
        out, self._out = self._out, []
        return out

    def refusal(self, theirs_version: int, version: int, model: str, layout: KVLayout | None) -> list[str]:
        """Why no blocks can be exchanged with somebody of this description, in words; empty when they can."""
        if theirs_version != version:
            return [f"protocol version: ours {version}, theirs {theirs_version}"]
        out = []
        if self.identity.model and model and self.identity.model != model:
            out.append(f"model: ours {self.identity.model!r}, theirs {model!r}")
        if self.identity.layout is not None and layout is not None:
            out.extend(self.identity.layout.diff(layout))
        return out
