"""Sessions: what the dialling side knows of an address and of the incarnation that answers there.

Theory of operation. A session belongs to one address. GREETING asks who is there; the Welcome names an incarnation and
everything later is addressed to exactly that one. CONNECTING has a transport chosen and connected; READY lets transfers
post reads. A session closes when its incarnation is gone (STALE, BYE, a broken connection), refuses us, or does not
answer in time: whatever was in flight on it fails, and the next pull greets afresh. A ticket that names another
incarnation than the session does not break it: PROBE asks again who is there, and only a changed answer closes it.

The answering side keeps no session: an owner's truth is its lease table, and every message carries what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pd_connector.layout import KVLayout
from pd_connector.protocol.messages import Endpoint, Welcome


class SessionState(StrEnum):
    GREETING = "greeting"
    CONNECTING = "connecting"
    READY = "ready"
    PROBING = "probing"
    CLOSED = "closed"


class SessionInput(StrEnum):
    WELCOMED = "welcomed"  # compatible, and a transport has to be connected
    WELCOMED_CONTROL = "welcomed, control only"  # speaks for ranks, or has nothing to read
    CONNECTED = "connected"
    PROBE = "probe"
    UNCHANGED = "same incarnation"
    LOST = "lost"  # refused, stale, bye, broken, silent: the reason is kept beside the state


TRANSITIONS: dict[tuple[SessionState, SessionInput], SessionState] = {
    (SessionState.GREETING, SessionInput.WELCOMED): SessionState.CONNECTING,
    (SessionState.GREETING, SessionInput.WELCOMED_CONTROL): SessionState.READY,
    (SessionState.CONNECTING, SessionInput.CONNECTED): SessionState.READY,
    (SessionState.READY, SessionInput.PROBE): SessionState.PROBING,
    (SessionState.PROBING, SessionInput.UNCHANGED): SessionState.READY,
    (SessionState.GREETING, SessionInput.LOST): SessionState.CLOSED,
    (SessionState.CONNECTING, SessionInput.LOST): SessionState.CLOSED,
    (SessionState.READY, SessionInput.LOST): SessionState.CLOSED,
    (SessionState.PROBING, SessionInput.LOST): SessionState.CLOSED,
}
"""A pair that is not listed is a late or repeated input and changes nothing."""


@dataclass(slots=True)
class Session:
    address: str
    state: SessionState = SessionState.GREETING
    incarnation: int = 0
    agent: str = ""
    transport: str = ""
    layout: KVLayout | None = None
    directory: dict[int, Endpoint] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    """Transfers that wait for READY, in order, each with the incarnation that its ticket names."""
    active: set[int] = field(default_factory=set)
    """Transfers that have posted, or will post, reads on this session."""

    @property
    def peer(self) -> str:
        """Names the incarnation towards transports; with the address, which nobody else can claim to have."""
        return f"{self.agent}#{self.incarnation:016x}@{self.address}"

    @property
    def who(self) -> str:
        """Names the other end towards people."""
        return f"{self.agent} at {self.address}" if self.agent else f"whoever is at {self.address}"

    @property
    def ranks(self) -> tuple[Endpoint, ...]:
        """The ranks with memory that are reached through this session, by number."""
        if self.directory:
            return tuple(endpoint for _, endpoint in sorted(self.directory.items()))
        if self.layout is None:
            return ()
        return (Endpoint(self.layout.rank, self.address, self.incarnation, self.layout),)

    def step(self, what: SessionInput) -> bool:
        """Apply an input; True when the state changed."""
        after = TRANSITIONS.get((self.state, what))
        if after is None:
            return False
        self.state = after
        return True

    def adopt(self, welcome: Welcome) -> None:
        self.incarnation = welcome.src
        self.agent = welcome.agent
        self.layout = welcome.layout
        self.directory = {endpoint.rank: endpoint for endpoint in welcome.directory}
