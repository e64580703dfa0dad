"""Tickets that are kept, given back or waited for without a pull: renewals while a request waits in a queue, early
releases, and questions for leases that are not granted yet."""

from __future__ import annotations

from pd_connector.protocol.claims import release_of, renew_of
from pd_connector.protocol.context import Context
from pd_connector.protocol.events import Disclaim, Drop, Expect, Forgo, Keep, Promised, TicketLost
from pd_connector.protocol.messages import Await, Granted, Renewed, Renounce, Stale
from pd_connector.protocol.ticket import Ticket

TicketKey = tuple[int, int, int]
Expected = tuple[str, bytes]
"""Address and capability."""


class Keeper:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[TicketKey, tuple[Ticket, float]] = {}
        self._expected: dict[Expected, tuple[Expect, float]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def expecting(self) -> int:
        return len(self._expected)

    def keep(self, event: Keep, now: float) -> None:
        key = _key(event.ticket)
        if key not in self._kept and len(self._kept) < self._context.limits.max_leases:
            self._kept[key] = (event.ticket, now + event.seconds)
            self.renew(key, now)

    def drop(self, event: Drop) -> None:
        self._forget(_key(event.ticket))

    def forgo(self, event: Forgo) -> None:
        ticket = event.ticket
        self._forget(_key(ticket))
        self._context.counters["tickets_released"] += 1
        release = release_of(ticket, self._context.incarnation, event.reader, event.readers)
        self._context.send(ticket.address, release)

    def renew(self, key: TicketKey, now: float) -> None:
        entry = self._kept.get(key)
        if entry is None:
            return
        ticket, until = entry
        if now >= until:
            self._forget(key)
            return
        self._context.timers.set(("keep", key), now + self._context.limits.renew)
        self._context.send(ticket.address, renew_of(ticket, self._context.incarnation))

    def renewed(self, route: str, message: Renewed, now: float) -> None:
        key = (message.src, message.lease, message.epoch)
        if key not in self._kept or self._kept[key][0].address != route:
            return
        if message.held:
            self._context.timers.set(("keep", key), now + max(message.remaining_ms / 3000, 0.05))
        else:
            self._lost(key)

    def stale(self, route: str, message: Stale) -> None:
        for key, (ticket, _) in list(self._kept.items()):
            if ticket.incarnation == message.incarnation and ticket.address == route:
                self._lost(key)

    def close(self) -> None:
        for key in list(self._kept):
            self._forget(key)
        for expected in list(self._expected):
            self._promised(expected, None, "this agent closed")

    # --- leases that are not granted yet ------------------------------------------------------------------------------

    def expect(self, event: Expect, now: float) -> None:
        """A second one waits with the first: as long as the longer of them."""
        key = event.address, event.capability
        _, until = self._expected.get(key, (event, 0.0))
        self._expected[key] = event, max(until, now + event.seconds)
        if len(self._expected) > self._context.limits.max_leases:
            self._promised(key, None, "too many leases are being waited for here (max_leases)")
        else:
            self.ask(key, now)

    def ask(self, key: Expected, now: float) -> None:
        event, until = self._expected[key]
        if now >= until:
            self._promised(key, None, f"no lease within {event.seconds:g} s: is its request still in a queue?")
            return
        self._context.timers.set(("expect", key), min(now + self._context.limits.ask, until))
        self._context.send(event.address, Await(src=self._context.incarnation, dst=0, capability=event.capability))

    def granted(self, route: str, message: Granted) -> None:
        key = route, message.capability
        if key not in self._expected:
            self._context.counters["late_events"] += 1
            return
        if not message.held:
            self._promised(key, None, message.reason)
            return
        ticket = Ticket(
            address=route,
            incarnation=message.src,
            lease=message.lease,
            epoch=message.epoch,
            capability=message.capability,
            blocks=((),) * message.groups,
            tokens=message.tokens,
            key=message.key,
        )
        self._promised(key, ticket, "")

    def disconnected(self, route: str, reason: str) -> None:
        for key in [key for key in self._expected if key[0] == route]:
            self._promised(key, None, f"{route}: {reason}")

    def disclaim(self, event: Disclaim) -> None:
        key = event.address, event.capability
        if self._expected.pop(key, None) is not None:
            self._context.timers.cancel(("expect", key))
        if event.renounce:
            self._context.counters["tickets_released"] += 1
            me = self._context.incarnation
            self._context.send(event.address, Renounce(src=me, dst=0, capability=event.capability))

    def _promised(self, key: Expected, ticket: Ticket | None, reason: str) -> None:
        del self._expected[key]
        self._context.timers.cancel(("expect", key))
        self._context.notify(Promised(*key, ticket, reason))

    # --- in common ----------------------------------------------------------------------------------------------------

    def _lost(self, key: TicketKey) -> None:
        ticket, _ = self._kept[key]
        self._forget(key)
        self._context.notify(TicketLost(ticket))

    def _forget(self, key: TicketKey) -> None:
        self._kept.pop(key, None)
        self._context.timers.cancel(("keep", key))


def _key(ticket: Ticket) -> TicketKey:
    return (ticket.incarnation, ticket.lease, ticket.epoch)
