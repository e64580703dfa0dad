"""Meetings: greeting an owner only to learn which ranks it has, so that reads from them can be planned."""

from __future__ import annotations

from pd_connector.errors import LayoutMismatch, LocalProtocolError, PDError, PeerLost
from pd_connector.protocol.context import Context
from pd_connector.protocol.dialer import Dialer
from pd_connector.protocol.events import Meet, Met
from pd_connector.protocol.session import Session


class Meetings:
    def __init__(self, context: Context, dialer: Dialer) -> None:
        self._context = context
        self._dialer = dialer
        self._open: dict[int, Meet] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._open

    def __len__(self) -> int:
        return len(self._open)

    def meet(self, event: Meet, now: float) -> None:
        """Raises LocalProtocolError, as a pull would."""
        if self._context.draining:
            raise LocalProtocolError("this agent is draining and starts no new pull")
        if event.timeout <= 0 or event.meeting in self._open:
            raise LocalProtocolError("a meeting needs a number of its own and a positive timeout")
        if len(self._open) >= self._context.limits.max_transfers:
            raise LocalProtocolError(f"{len(self._open)} owners are being greeted, the limit is max_transfers")
        self._open[event.meeting] = event
        self._context.timers.set(("meet", event.meeting), now + event.timeout)
        self._dialer.attach(event.meeting, event.ticket.address, event.ticket.incarnation, now)

    def ready(self, number: int, session: Session, now: float) -> None:
        numbers = [rank.rank for rank in session.ranks]
        error = None
        if not session.ranks:
            # It may not have known its ranks yet when it said hello: the next one asks again.
            error = LayoutMismatch(f"{session.who} has no memory, nor ranks that have")
        elif numbers != [rank.layout.rank for rank in session.ranks]:
            error = LayoutMismatch(f"{session.who} names ranks {numbers[:8]} with the layouts of others")
        if error is not None:
            self.fail(number, error)
            self._dialer.data_lost(session.address, session.peer, error, now)
            return
        self._context.timers.cancel(("meet", number))
        del self._open[number]
        self._context.notify(Met(number, session.ranks))

    def fail(self, number: int, error: PDError) -> None:
        self._context.counters["meetings_failed"] += 1
        self._context.timers.cancel(("meet", number))
        del self._open[number]
        self._context.notify(Met(number, (), error))

    def abort(self, number: int, reason: str, now: float) -> None:
        """Nobody waits for it any more."""
        event = self._open[number]
        self.fail(number, PeerLost(f"greeting the owner of {event.ticket!r}: {reason}"))
        self._dialer.detach(number, event.ticket.address, now)

    def close(self, now: float) -> None:
        for number in list(self._open):
            self.abort(number, "this agent closed", now)
