"""Tickets that are kept or given back without a pull: renewals while a request waits in a queue, and early releases."""

from __future__ import annotations

from pd_connector.protocol.context import Context
from pd_connector.protocol.events import Drop, Forgo, Keep, TicketLost
from pd_connector.protocol.messages import Release, Renew, Renewed, Stale
from pd_connector.protocol.ticket import Ticket

TicketKey = tuple[int, int, int]


class Keeper:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[TicketKey, tuple[Ticket, float]] = {}

    def __len__(self) -> int:
        return len(self._kept)

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
        self._context.send(
            ticket.address,
            Release(
                src=self._context.incarnation,
                dst=ticket.incarnation,
                lease=ticket.lease,
                epoch=ticket.epoch,
                capability=ticket.capability,
                reader=event.reader,
                readers=event.readers,
            ),
        )

    def renew(self, key: TicketKey, now: float) -> None:
        entry = self._kept.get(key)
        if entry is None:
            return
        ticket, until = entry
        if now >= until:
            self._forget(key)
            return
        self._context.timers.set(("keep", key), now + self._context.limits.renew)
        self._context.send(
            ticket.address,
            Renew(
                src=self._context.incarnation,
                dst=ticket.incarnation,
                lease=ticket.lease,
                epoch=ticket.epoch,
                capability=ticket.capability,
            ),
        )

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

    def _lost(self, key: TicketKey) -> None:
        ticket, _ = self._kept[key]
        self._forget(key)
        self._context.notify(TicketLost(ticket))

    def _forget(self, key: TicketKey) -> None:
        self._kept.pop(key, None)
        self._context.timers.cancel(("keep", key))


def _key(ticket: Ticket) -> TicketKey:
    return (ticket.incarnation, ticket.lease, ticket.epoch)
