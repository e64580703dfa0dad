"""Promises: capabilities that somebody chose before the owner granted a lease under them.

Whoever brokers a hand-over may choose its capability and tell both sides at once. The reader then awaits the lease
here, and the broker can renounce it without knowing its number: also before it is granted, then it ends at once.
"""

from __future__ import annotations

from collections import OrderedDict

from pd_connector.protocol.context import Context
from pd_connector.protocol.lease import Lease
from pd_connector.protocol.messages import Await, Granted, Renounce

RENOUNCED = "released by whoever brokers the hand-over"
_ENDED = "ended before anybody asked for it"


class Promises:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._held: dict[bytes, Lease] = {}
        self._over: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        """Renounced, or of leases that ended: why, and when, so that it can be forgotten."""
        self._waiting: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        """Who awaits what: the asker's incarnation. They ask again, so the oldest may be forgotten."""
        self._routes: dict[bytes, set[str]] = {}
        """The same by capability."""

    def granted(self, lease: Lease) -> str:
        """Why it has to end at once, or nothing."""
        if lease.promise is None:
            return ""
        if (over := self._over.get(lease.capability)) is not None and over[1] == RENOUNCED:
            return RENOUNCED
        self._held[lease.capability] = lease
        self._over.pop(lease.capability, None)
        self._answer(lease.capability)
        return ""

    def ended(self, lease: Lease, now: float) -> None:
        if lease.promise is None:
            return
        if self._held.get(lease.capability) is lease:
            del self._held[lease.capability]
        if not lease.again:
            self._remember(lease.capability, lease.reason or _ENDED, now)

    def asked(self, route: str, message: Await, now: float) -> None:
        key = route, message.capability
        self._waiting[key] = message.src
        self._waiting.move_to_end(key)
        self._routes.setdefault(message.capability, set()).add(route)
        if len(self._waiting) > self._context.limits.max_parked:
            self._forget(next(iter(self._waiting)))
        self._context.timers.set(("await", key), now + self._context.limits.awaited)
        self._answer(message.capability)

    def give_up(self, key: tuple[str, bytes]) -> None:
        """The asker did not repeat itself: it is gone, or has what it needs."""
        self._forget(key)

    def _forget(self, key: tuple[str, bytes]) -> int:
        self._context.timers.cancel(("await", key))
        route, capability = key
        routes = self._routes.get(capability, set())
        routes.discard(route)
        if not routes:
            self._routes.pop(capability, None)
        return self._waiting.pop(key, 0)

    def renounce(self, message: Renounce, now: float) -> Lease | None:
        """The lease that has to end, if it is held."""
        self._context.counters["leases_renounced"] += 1
        lease = self._held.get(message.capability)
        if lease is None:
            self._remember(message.capability, RENOUNCED, now)
        return lease

    def deny(self, capability: bytes, reason: str, now: float) -> None:
        """No lease will come; one that is held stays."""
        if capability not in self._held:
            self._remember(capability, reason, now)

    def close(self) -> None:
        for key in list(self._waiting):
            self._forget(key)

    def _remember(self, capability: bytes, reason: str, now: float) -> None:
        self._over.pop(capability, None)
        self._over[capability] = now, reason
        limits = self._context.limits
        while len(self._over) > limits.max_remembered or next(iter(self._over.values()))[0] < now - limits.remember:
            self._over.popitem(last=False)
        self._answer(capability)

    def _answer(self, capability: bytes) -> None:
        lease, over = self._held.get(capability), self._over.get(capability)
        if lease is None and over is None:
            return
        for route in list(self._routes.get(capability, ())):
            src = self._forget((route, capability))
            self._context.send(route, self._answer_to(src, capability, lease, "" if over is None else over[1]))

    def _answer_to(self, asker: int, capability: bytes, lease: Lease | None, reason: str) -> Granted:
        me = self._context.incarnation
        if lease is None or lease.promise is None:
            return Granted(src=me, dst=asker, capability=capability, held=False, reason=reason)
        return Granted(
            src=me,
            dst=asker,
            capability=capability,
            held=True,
            lease=lease.number,
            epoch=lease.epoch,
            tokens=lease.promise.tokens,
            key=lease.promise.key,
            groups=lease.promise.groups,
        )
