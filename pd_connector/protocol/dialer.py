"""Sessions with the owners that we dial: who answers at an address, over which transport its memory is read."""

from __future__ import annotations

from typing import Protocol

from pd_connector.errors import LayoutMismatch, LocalProtocolError, PDError, PeerLost, TransportUnavailable
from pd_connector.protocol.context import Context
from pd_connector.protocol.events import Connect, Connected, Disconnect, Hangup
from pd_connector.protocol.messages import VERSION, Bye, Hello, Stale, Welcome
from pd_connector.protocol.session import Session, SessionInput, SessionState


class Passengers(Protocol):
    """Who waits for sessions: the transfers, by number."""

    def session_ready(self, number: int, session: Session, now: float) -> None: ...

    def session_failed(self, number: int, error: PDError, now: float) -> None: ...


class Dialer:
    def __init__(self, context: Context, passengers: Passengers) -> None:
        self._context = context
        self._passengers = passengers
        self.sessions: dict[str, Session] = {}
        self.unsettled: set[str] = set()
        """Peers whose fence never ended: refused from then on, so that the leak stays bounded."""

    def attach(self, number: int, address: str, incarnation: int, now: float) -> None:
        """Call session_ready (perhaps at once) or session_failed for a transfer that needs this incarnation."""
        session = self.sessions.get(address)
        if session is None:
            if len(self.sessions) >= self._context.limits.max_sessions and not self._drop_idle(now):
                error = LocalProtocolError(f"{len(self.sessions)} peers are in use, the limit is max_sessions")
                self._passengers.session_failed(number, error, now)
                return
            session = self.sessions[address] = Session(address)
            session.waiting[number] = incarnation
            self._greet(session, now)
            return
        session.waiting[number] = incarnation
        if session.state is SessionState.READY and session.incarnation == incarnation:
            self._next_waiting(session, now)
        elif session.step(SessionInput.PROBE):
            self._greet(session, now)

    def detach(self, number: int, address: str, now: float) -> None:
        """A transfer does not use its session any more; the next one in the queue may start."""
        session = self.sessions.get(address)
        if session is None:
            return
        session.waiting.pop(number, None)
        if number in session.active:
            session.active.discard(number)
            self._next_waiting(session, now)

    def refuse(self, peer: str, now: float) -> None:
        """Have nothing to do with a peer until ``unsettled`` does not name it any more."""
        self.unsettled.add(peer)
        for session in [session for session in self.sessions.values() if session.peer == peer]:
            self._lose(session, PeerLost(f"{session.who}: reads from it do not settle"), now)

    def close(self, now: float) -> None:
        for session in list(self.sessions.values()):
            if session.incarnation:
                self._context.send(session.address, Bye(src=self._context.incarnation, dst=session.incarnation))
            self._lose(session, PeerLost("this agent closed"), now)

    # --- greeting -----------------------------------------------------------------------------------------------------

    def _greet(self, session: Session, now: float) -> None:
        self._context.timers.set(("session", session.address), now + self._context.limits.hello)
        self._say_hello(session, now)

    def _say_hello(self, session: Session, now: float) -> None:
        me = self._context.identity
        self._context.timers.set(("hello", session.address), now + self._context.limits.retry)
        self._context.send(
            session.address,
            Hello(
                src=me.incarnation,
                dst=0,
                version=VERSION,
                agent=me.agent,
                model=me.model,
                layout=me.layout,
                transports=me.transports,
            ),
        )

    def hello_again(self, address: str, now: float) -> None:
        session = self.sessions.get(address)
        if session is not None and session.state in (SessionState.GREETING, SessionState.PROBING):
            self._say_hello(session, now)

    def timeout(self, address: str, now: float) -> None:
        session = self.sessions.get(address)
        if session is not None and session.state is not SessionState.READY:
            stage = "connecting a transport" if session.state is SessionState.CONNECTING else "HELLO"
            error = PeerLost(
                f"{session.who} did not finish {stage} within {self._context.limits.hello:g} s; "
                "check that it runs, that the address is right and reachable, and its keys"
            )
            self._lose(session, error, now)

    def welcome(self, route: str, message: Welcome, now: float) -> None:
        session = self.sessions.get(route)
        if session is None or session.state not in (SessionState.GREETING, SessionState.PROBING):
            self._context.counters["late_events"] += 1
            return
        if session.state is SessionState.PROBING:
            self._probed(session, message, now)
            return
        session.adopt(message)
        diff = self._context.refusal(message.version, VERSION, message.model, message.layout)
        if diff or message.refused:
            error = LayoutMismatch(f"{session.who} cannot exchange blocks with us", diff or [message.refused])
            self._lose(session, error, now)
        elif session.peer in self.unsettled:
            self._lose(session, PeerLost(f"{session.who}: an earlier read from it never settled; restart it"), now)
        elif message.directory or not message.transports:
            session.step(SessionInput.WELCOMED_CONTROL)
            self._ready(session, now)
        else:
            session.step(SessionInput.WELCOMED)
            self._context.emit(Connect(session.peer, message.transports))

    def _probed(self, session: Session, message: Welcome, now: float) -> None:
        if message.src == session.incarnation:
            session.adopt(message)
            session.step(SessionInput.UNCHANGED)
            self._ready(session, now)
            return
        waiting, session.waiting = session.waiting, {}
        self._lose(session, PeerLost(f"{session.who} restarted"), now)
        for number, incarnation in waiting.items():
            self.attach(number, session.address, incarnation, now)

    def connected(self, event: Connected, now: float) -> None:
        for session in self.sessions.values():
            if session.state is SessionState.CONNECTING and session.peer == event.peer:
                break
        else:
            self._context.counters["late_events"] += 1
            return
        if event.error:
            self._lose(session, TransportUnavailable("any", f"{session.who}: {event.error}"), now)
        else:
            session.transport = event.transport
            session.step(SessionInput.CONNECTED)
            self._ready(session, now)

    def _ready(self, session: Session, now: float) -> None:
        self._context.timers.cancel(("session", session.address))
        self._context.timers.cancel(("hello", session.address))
        self._next_waiting(session, now)

    def _next_waiting(self, session: Session, now: float) -> None:
        """Start waiting transfers in order, as far as the bound on transfers per peer allows."""
        while session.waiting and session.state is SessionState.READY:
            if len(session.active) >= self._context.limits.max_transfers_per_peer:
                return
            number = next(iter(session.waiting))
            incarnation = session.waiting.pop(number)
            if incarnation == session.incarnation:
                self._passengers.session_ready(number, session, now)
                continue
            error = PeerLost(
                f"the ticket is of incarnation {incarnation:016x}, {session.who} is {session.incarnation:016x}: "
                "it restarted, or the ticket is forged; ask for a new ticket"
            )
            self._passengers.session_failed(number, error, now)

    # --- losing -------------------------------------------------------------------------------------------------------

    def disconnected(self, address: str, reason: str, now: float) -> None:
        if (session := self.sessions.get(address)) is not None:
            self._lose(session, PeerLost(f"{session.who}: connection lost: {reason}"), now)

    def stale(self, route: str, message: Stale, now: float) -> None:
        session = self.sessions.get(route)
        if session is not None and session.incarnation == message.incarnation:
            self._lose(session, PeerLost(f"{session.who} restarted, its leases are gone"), now)

    def bye(self, route: str, message: Bye, now: float) -> None:
        session = self.sessions.get(route)
        if session is not None and session.incarnation == message.src:
            self._lose(session, PeerLost(f"{session.who} closed"), now)

    def data_lost(self, address: str, peer: str, error: PDError, now: float) -> None:
        """The data connection of a session broke."""
        session = self.sessions.get(address)
        if session is not None and session.peer == peer:
            self._lose(session, error, now)

    def _drop_idle(self, now: float) -> bool:
        """Give up the oldest session that nobody uses: owners come and go, and few of them say goodbye."""
        for session in self.sessions.values():
            if session.state is SessionState.READY and not session.active and not session.waiting:
                self._lose(session, PeerLost("nobody uses it"), now)
                return True
        return False

    def _lose(self, session: Session, error: PDError, now: float) -> None:
        if not session.step(SessionInput.LOST):
            return
        del self.sessions[session.address]
        self._context.counters["sessions_lost"] += 1
        self._context.timers.cancel(("session", session.address))
        self._context.timers.cancel(("hello", session.address))
        for number in [*session.active, *session.waiting]:
            self._passengers.session_failed(number, error, now)
        if session.incarnation:
            self._context.emit(Disconnect(session.peer))
        self._context.emit(Hangup(session.address))
