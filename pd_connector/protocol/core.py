"""The protocol core of one agent: ``handle(event, now) → commands``, nothing else goes in or out.

The caller owns the clock (any monotonic one, in seconds) and calls ``handle(Tick(), now)`` no later than
``next_deadline()``. Deadlines that have passed are always applied before the event itself, so that a process which was
stopped for a while ends its leases before it answers anybody.
"""

from __future__ import annotations

from typing import Any, assert_never

from msgspec.structs import replace

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.context import Context, Identity, Limits
from pd_connector.protocol.events import (
    Abort,
    Append,
    Close,
    Command,
    Completed,
    Connected,
    Deny,
    Digested,
    Disclaim,
    Disconnected,
    Drain,
    Drained,
    Drop,
    End,
    Event,
    Expect,
    Extend,
    Forgo,
    Grant,
    Grow,
    Inform,
    Informed,
    Keep,
    Meet,
    Pull,
    Received,
    Tick,
)
from pd_connector.protocol.keeper import Keeper
from pd_connector.protocol.messages import (
    Account,
    AnyMessage,
    Await,
    Bye,
    Commit,
    Granted,
    Hello,
    Open,
    Opened,
    Ready,
    Refused,
    Release,
    Renew,
    Renewed,
    Renounce,
    Saved,
    Stale,
    Verdict,
    Welcome,
    decode,
)
from pd_connector.protocol.owner import Owner
from pd_connector.protocol.reader import Reader
from pd_connector.protocol.transfer import TransferState


class Core:
    def __init__(self, identity: Identity, limits: Limits | None = None) -> None:
        self._context = Context(identity, limits or Limits())
        self.owner = Owner(self._context)
        self.reader = Reader(self._context)
        self.keeper = Keeper(self._context)
        self.counters = self._context.counters
        self._drained = False
        self._now = 0.0

    @property
    def identity(self) -> Identity:
        return self._context.identity

    @identity.setter
    def identity(self, identity: Identity) -> None:
        """Replace what HELLO says of us (memory was registered, ranks became known); the incarnation must stay."""
        assert identity.incarnation == self._context.incarnation
        self._context.identity = identity

    def new_id(self) -> int:
        return self._context.new_id()

    def next_deadline(self) -> float | None:
        """When to call ``handle`` at the latest, or None. Not in the future when commands wait to be taken."""
        return self._now if self._context.has_commands else self._context.timers.next()

    def gauges(self) -> dict[str, int]:
        """What is held or under way right now."""
        states = [transfer.state for transfer in self.reader.transfers.values()]
        return {
            "leases": len(self.owner.table),
            "leased_blocks": self.owner.table.held_blocks,
            "transfers_waiting": states.count(TransferState.CONNECTING),
            "transfers_active": states.count(TransferState.READING) + states.count(TransferState.CONFIRMING),
            "transfers_quarantined": states.count(TransferState.SETTLING),
            "tickets_kept": len(self.keeper),
            "leases_expected": self.keeper.expecting,
            "peers": len(self.reader.dialer.sessions),
        }

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply an event; the commands are to be carried out in order.

        Raises LocalProtocolError, and does nothing of it, when a local call (Pull, Grant) breaks a rule or a bound;
        what was due by then comes out of the next call."""
        self._now = now
        for timer in self._context.timers.due(now):
            self._timer(timer, now)
        try:
            self._apply(event, now)
        finally:
            self._check_drained()
        return self._context.take()

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case Received(route, frame):
                self._receive(route, frame, now)
            case Completed():
                self.reader.completed(event, now)
            case Tick():
                pass
            case Meet():
                self.reader.meetings.meet(event, now)
            case Pull():
                self.reader.pull(event, now)
            case Append():
                self.reader.append(event, now)
            case Abort(transfer, reason):
                self.reader.abort(transfer, reason, now)
            case Grant():
                self.owner.grant(event, now)
            case Grow():
                self.owner.grow(event)
            case End(number, reason, again):
                self.owner.end(number, reason, now, again)
            case Deny(capability, reason):
                self.owner.promises.deny(capability, reason, now)
            case Extend():
                self.owner.extend(event, now)
            case Connected():
                self.reader.dialer.connected(event, now)
            case Disconnected(route, reason):
                self.reader.dialer.disconnected(route, reason, now)
                self.keeper.disconnected(route, reason)
            case Digested():
                if not self.reader.digested(event, now):
                    self.owner.digested(event, now)
            case Forgo():
                self.keeper.forgo(event)
            case Keep():
                self.keeper.keep(event, now)
            case Drop():
                self.keeper.drop(event)
            case Expect():
                self.keeper.expect(event, now)
            case Disclaim():
                self.keeper.disclaim(event)
            case Inform(address, message):
                self._context.send(address, replace(message, src=self._context.incarnation, dst=0))
            case Drain():
                self._context.draining = True
            case Close():
                self._context.draining = True
                self.reader.close(now)
                self.owner.close(now)
                self.keeper.close()
            case _:
                assert_never(event)

    def _receive(self, route: str, frame: bytes, now: float) -> None:
        try:
            message = decode(frame)
        except RemoteProtocolError:
            self.counters["malformed_frames"] += 1
            return
        if isinstance(message, Hello):
            self.owner.hello(route, message)
        elif self.is_for_us(message):
            self._dispatch(route, message, now)
        else:
            self.counters["stale_messages"] += 1
            if isinstance(message, Open | Commit | Renew | Release):
                me = self._context.incarnation
                self._context.send(route, Stale(src=me, dst=message.src, incarnation=message.dst))

    def is_for_us(self, message: AnyMessage) -> bool:
        """Only what is meant for this very incarnation counts: transfer and lease numbers start anew in each.
        Capabilities do not, and who speaks of one may know no more than an address."""
        nameless = isinstance(message, Await | Renounce | Account | Saved) and not message.dst
        return message.dst == self._context.incarnation or nameless

    def _dispatch(self, route: str, message: AnyMessage, now: float) -> None:
        match message:
            case Open() | Commit() | Renew() | Release():
                self.owner.request(route, message, now)
            case Await():
                self.owner.promises.asked(route, message, now)
            case Renounce():
                self.owner.renounce(message, now)
            case Granted():
                self.keeper.granted(route, message)
            case Account() | Saved():
                self._context.notify(Informed(message))
            case Ready():
                self.reader.ready(route, message, now)
            case Welcome():
                self.reader.dialer.welcome(route, message, now)
            case Opened():
                self.reader.opened(route, message, now)
            case Verdict():
                self.reader.verdict(route, message, now)
            case Renewed():
                self.keeper.renewed(route, message, now)
            case Refused():
                self.reader.refused(route, message, now)
            case Stale():
                self.keeper.stale(route, message)
                self.reader.dialer.stale(route, message, now)
            case Bye():
                self.reader.dialer.bye(route, message, now)
            case Hello():
                raise AssertionError("handled before")
            case _:
                assert_never(message)

    def _timer(self, timer: Any, now: float) -> None:
        kind, key = timer
        match kind:
            case "lease":
                self.owner.expire(key, now)
            case "parked":
                self.owner.give_up_parked(key)
            case "hello":
                self.reader.dialer.hello_again(key, now)
            case "session":
                self.reader.dialer.timeout(key, now)
            case "transfer":
                self.reader.transfer_timeout(key, now)
            case "meet":
                self.reader.meetings.abort(key, "nobody answered in time", now)
            case "retry":
                self.reader.retry(key, now)
            case "renew":
                self.reader.renew(key, now)
            case "settle":
                self.reader.settle_timeout(key, now)
            case "fence":
                self.reader.fence_timeout(key, now)
            case "keep":
                self.keeper.renew(key, now)
            case "expect":
                self.keeper.ask(key, now)
            case "await":
                self.owner.promises.give_up(key)
            case _:
                raise AssertionError(f"no such timer: {kind}")

    def _check_drained(self) -> None:
        idle = not len(self.owner.table) and not self.reader.transfers
        if self._context.draining and idle and not self._drained:
            self._drained = True
            self._context.notify(Drained())
