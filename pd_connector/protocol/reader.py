"""The reader's half of the core: greets owners, pulls blocks, asks for verdicts, keeps destinations in quarantine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pd_connector.errors import (
    Abandoned,
    LayoutMismatch,
    LeaseExpired,
    LocalProtocolError,
    PDError,
    PeerLost,
    RemoteProtocolError,
    TransferFailed,
    TransportUnavailable,
)
from pd_connector.plan import CopyPlan
from pd_connector.protocol.claims import commit_of, open_of, release_of, renew_of
from pd_connector.protocol.context import Context
from pd_connector.protocol.dialer import Dialer
from pd_connector.protocol.events import (
    Append,
    BlocksReady,
    Cancel,
    Completed,
    DigestBlocks,
    Digested,
    Fence,
    PartConfirmed,
    PostRead,
    Pull,
    TransferEnded,
)
from pd_connector.protocol.meetings import Meetings
from pd_connector.protocol.messages import DIGEST_BYTES, MAX_FRAME, Opened, Ready, Refused, Verdict
from pd_connector.protocol.session import Session
from pd_connector.protocol.ticket import MAX_BLOCKS
from pd_connector.protocol.transfer import PartState, Transfer, TransferInput, TransferState

_ENVELOPE = 4096
"""More than everything in a Commit but its audit takes, in bytes."""
_TOO_LONG = f"the audit of a part does not fit into {MAX_FRAME} bytes; pull in more parts"
_REPOSTS = 3
"""How often a follower's read may find that the owner's transport does not know its lease."""


class Reader:
    def __init__(self, context: Context) -> None:
        self._context = context
        self.dialer = Dialer(context, self)
        self.meetings = Meetings(context, self.dialer)
        self.transfers: dict[int, Transfer] = {}
        self._tags: dict[int, int] = {}
        self._jobs: dict[int, int] = {}
        self._fences: dict[int, str] = {}

    # --- local calls --------------------------------------------------------------------------------------------------

    def pull(self, event: Pull, now: float) -> None:
        limits = self._context.limits
        if self._context.draining:
            raise LocalProtocolError("this agent is draining and starts no new pull")
        if bool(event.parts) == event.follow or event.timeout <= 0:
            raise LocalProtocolError("a pull needs parts, unless it follows a lease; and a positive timeout")
        if event.transfer in self.transfers:
            raise LocalProtocolError(f"transfer {event.transfer} is running already")
        if len(self.transfers) >= limits.max_transfers:
            raise LocalProtocolError(
                f"{len(self.transfers)} transfers are running, the limit is {limits.max_transfers}"
            )
        if event.audit and any(map(_too_long, event.parts)):
            raise LocalProtocolError(_TOO_LONG)
        ticket = event.ticket
        transfer = Transfer(event, now, ticket.address, ticket.incarnation, now + event.timeout)
        self.transfers[event.transfer] = transfer
        self._context.counters["transfers"] += 1
        self._context.timers.set(("transfer", event.transfer), transfer.deadline)
        self._context.timers.set(("renew", event.transfer), now + self._context.limits.renew)
        self.dialer.attach(event.transfer, ticket.address, ticket.incarnation, now)

    def append(self, event: Append, now: float) -> None:
        """Late for a transfer that has ended or gives up."""
        transfer = self.transfers.get(event.transfer)
        if transfer is None or not transfer.more or transfer.state is TransferState.SETTLING:
            self._context.counters["late_events"] += 1
            return
        if transfer.pull.audit and _too_long(event.part):
            self._give_up(transfer, TransferFailed(f"{self._words(transfer)}: {_TOO_LONG}"), now)
            return
        # Every part is of what was asked for, so there is an end to them; what an owner says beyond it is no progress.
        self._context.timers.set(("transfer", event.transfer), now + transfer.pull.timeout)
        transfer.plans.append(event.part)
        transfer.parts.append(PartState.PENDING)
        transfer.more = not event.last
        self._advance(transfer, now)

    def abort(self, number: int, reason: str, now: float) -> None:
        if number in self.meetings:
            self.meetings.abort(number, reason, now)
            return
        transfer = self.transfers.get(number)
        if transfer is None:
            self._context.counters["late_events"] += 1
        else:
            self._give_up(transfer, TransferFailed(f"{self._words(transfer)}: {reason}"), now, outcome="aborted")

    def close(self, now: float) -> None:
        for transfer in list(self.transfers.values()):
            error = TransferFailed(f"{self._words(transfer)}: this agent closed")
            self._give_up(transfer, error, now, outcome="aborted")
        self.meetings.close(now)
        self.dialer.close(now)

    def outstanding_tags(self) -> list[int]:
        return list(self._tags)

    # --- reading ------------------------------------------------------------------------------------------------------

    def session_failed(self, number: int, error: PDError, now: float) -> None:
        if number in self.meetings:
            self.meetings.fail(number, error)
            return
        transfer = self.transfers.get(number)
        if transfer is not None and transfer.state is not TransferState.SETTLING:
            self._give_up(transfer, error, now)

    def session_ready(self, number: int, session: Session, now: float) -> None:
        if number in self.meetings:
            self.meetings.ready(number, session, now)
            return
        transfer = self.transfers.get(number)
        if transfer is None or transfer.state is not TransferState.CONNECTING:
            return
        if session.directory:
            endpoint = session.directory.get(transfer.pull.rank)
            named = transfer.pull.ticket.address
            if endpoint is None or transfer.address != named or endpoint.address == named:
                why = f"{session.who} does not name an agent with memory as rank {transfer.pull.rank}"
                # It may not have known its ranks yet when it said hello: the next pull asks again.
                self.dialer.data_lost(session.address, session.peer, LayoutMismatch(why), now)
                self.session_failed(number, LayoutMismatch(why), now)
                return
            transfer.address, transfer.incarnation = endpoint.address, endpoint.incarnation
            transfer.layout = endpoint.layout
            self.dialer.attach(number, endpoint.address, endpoint.incarnation, now)
            return
        error: PDError | None = None
        if not session.transport:
            error = TransportUnavailable("any", f"{session.who} offers no transport")
        elif transfer.layout not in (None, session.layout):
            error = LayoutMismatch(f"{session.who} has other memory than whoever speaks for it says")
        if error is not None:
            self.dialer.data_lost(session.address, session.peer, error, now)
            self.session_failed(number, error, now)
            return
        transfer.step(TransferInput.PEER_READY)
        transfer.ready_at = now
        transfer.transport, transfer.peer = session.transport, session.peer
        session.active.add(number)
        self._send_open(transfer)
        self._context.timers.set(("retry", number), now + self._context.limits.retry)
        self._advance(transfer, now)

    def _send_open(self, transfer: Transfer) -> None:
        self._context.send(transfer.address, open_of(transfer, self._context.identity))

    def _advance(self, transfer: Transfer, now: float) -> None:
        """Post reads up to the window, ask for verdicts on what was read, and commit when only that is left."""
        if transfer.state is not TransferState.READING:
            return
        for part in list(transfer.in_state(PartState.PENDING)):
            if len(transfer.unread) >= self._context.limits.window:
                break
            some = [index for index, plan in enumerate(transfer.plans[part]) if plan.num_blocks]
            if not some:
                self._part_read(transfer, part)
                continue
            transfer.parts[part] = PartState.POSTED
            transfer.unread[part] = len(some)
            for index in some:
                self._post(transfer, part, index, now)
        others = transfer.parts[:-1]
        whole = bool(transfer.parts) and not transfer.more
        if whole and transfer.parts[-1] is PartState.READ and all(part is PartState.CONFIRMED for part in others):
            transfer.step(TransferInput.ALL_READ)
            transfer.read_at = now
            self._ask(transfer, transfer.last)

    def _post(self, transfer: Transfer, part: int, index: int, now: float) -> None:
        tag, pull, ticket = self._context.new_id(), transfer.pull, transfer.pull.ticket
        if not transfer.tags:
            transfer.reading_since = now
        transfer.tags[tag] = part, index
        self._tags[tag] = pull.transfer
        claim = ticket.lease, ticket.epoch, ticket.capability
        self._context.emit(
            PostRead(transfer.peer, transfer.transport, *claim, transfer.plans[part][index], tag, pull.priority)
        )

    def completed(self, event: Completed, now: float) -> None:
        if (peer := self._fences.pop(event.tag, None)) is not None:
            self._fenced(event, peer, now)
            return
        number = self._tags.pop(event.tag, None)
        transfer = None if number is None else self.transfers.get(number)
        if transfer is None:
            self._context.counters["late_events"] += 1
            return
        part, index = transfer.tags.pop(event.tag)
        if not transfer.tags:
            transfer.reading += now - transfer.reading_since
        pull = transfer.pull
        if transfer.state is TransferState.SETTLING:
            if event.status == "abandoned":
                transfer.outcome = event.status
                transfer.error = Abandoned(
                    f"{self._words(transfer)}: this agent closed while a device may still write into its blocks: "
                    "never use them again, and end this process"
                )
            self._settle(transfer, now)
        elif event.status == "done":
            transfer.unread[part] -= 1
            if not transfer.unread[part]:
                del transfer.unread[part]
                self._part_read(transfer, part)
                self._advance(transfer, now)
        elif event.status == "not_granted" and transfer.reposted[part, index] < (_REPOSTS if pull.follow else 1):
            # The grant may still be on its way from the owner's engine to its transport: wait for OPENED, try again. Or
            # the lease has just ended: the owner alone can tell a follower whether it comes again.
            transfer.reposted[part, index] += 1
            if pull.follow:
                transfer.opened = False
                self._send_open(transfer)
            if transfer.opened:
                self._post(transfer, part, index, now)
            else:
                transfer.parked.append((part, index))
        elif event.status == "not_granted":
            error: PDError = LeaseExpired(f"{self._words(transfer)}: the owner's transport refused: {event.detail}")
            self._give_up(transfer, error, now)
        elif event.status == "peer_lost":
            error = PeerLost(f"{self._words(transfer)}: {event.detail or 'the data connection broke'}")
            self._give_up(transfer, error, now)
            self.dialer.data_lost(transfer.address, transfer.peer, error, now)
        else:
            error = TransferFailed(f"{self._words(transfer)}: read ended {event.status}: {event.detail}")
            self._give_up(transfer, error, now)

    def _part_read(self, transfer: Transfer, part: int) -> None:
        transfer.parts[part] = PartState.READ
        if part != transfer.last:
            self._ask(transfer, part)

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def _ask(self, transfer: Transfer, part: int) -> None:
        """Ask for the verdict on a part that was read; with audit, digest it first."""
        if not transfer.pull.audit or part in transfer.digests:
            self._send_commit(transfer, part)
        elif part not in transfer.jobs.values():
            job = self._context.new_id()
            transfer.jobs[job] = part
            self._jobs[job] = transfer.pull.transfer
            self._context.emit(DigestBlocks(job, tuple(plan.side(1) for plan in transfer.plans[part])))

    def digested(self, event: Digested, now: float) -> bool:
        """False when the job is not one of ours."""
        number = self._jobs.pop(event.job, None)
        if number is None:
            return False
        transfer = self.transfers.get(number)
        if transfer is None or transfer.state not in (TransferState.READING, TransferState.CONFIRMING):
            self._context.counters["late_events"] += 1
            return True
        part = transfer.jobs.pop(event.job)
        if event.digests is None:
            self._give_up(transfer, TransferFailed(f"{self._words(transfer)}: could not digest what was read"), now)
        else:
            transfer.digests[part] = event.digests
            self._send_commit(transfer, part)
        return True

    def _send_commit(self, transfer: Transfer, part: int) -> None:
        self._context.send(transfer.address, commit_of(transfer, part, self._context.identity))

    def _answered(self, route: str, message: Opened | Ready | Verdict | Refused) -> Transfer | None:
        """The transfer that an answer is about. Nobody but the incarnation that was asked can answer, nor another
        address in its name."""
        transfer = self.transfers.get(message.transfer)
        if transfer is None or transfer.incarnation != message.src or transfer.address != route:
            self._context.counters["late_events"] += 1
            return None
        return transfer

    def verdict(self, route: str, message: Verdict, now: float) -> None:
        if (transfer := self._answered(route, message)) is None:
            return
        final = message.part == transfer.last
        expected = TransferState.CONFIRMING if final else TransferState.READING
        asked = message.part < len(transfer.parts) and transfer.parts[message.part] is PartState.READ
        if transfer.state is not expected or not asked:
            self._context.counters["late_events"] += 1
            return
        if not message.held:
            self._context.counters["verdicts_not_held"] += 1
            self._give_up(transfer, LeaseExpired(f"{self._words(transfer)}: {message.reason}", message.again), now)
            return
        transfer.compared += message.compared
        transfer.parts[message.part] = PartState.CONFIRMED
        self._context.counters["parts_confirmed"] += 1
        self._context.notify(PartConfirmed(transfer.pull.transfer, message.part))
        if final:
            transfer.step(TransferInput.HELD)
            transfer.outcome = "done"
            self._end(transfer, now)
        else:
            self._advance(transfer, now)

    def opened(self, route: str, message: Opened, now: float) -> None:
        if (transfer := self._answered(route, message)) is None:
            return
        if transfer.state is not TransferState.READING:
            self._context.counters["late_events"] += 1
            return
        if not message.held:
            self._give_up(transfer, LeaseExpired(f"{self._words(transfer)}: {message.reason}", message.again), now)
            return
        transfer.opened = True
        transfer.renew_every = max(message.remaining_ms / 3000, 0.05)
        self._context.timers.set(("renew", transfer.pull.transfer), now + transfer.renew_every)
        parked, transfer.parked = transfer.parked, []
        for part, index in parked:
            self._post(transfer, part, index, now)

    def ready(self, route: str, message: Ready, now: float) -> None:
        """More blocks to follow. When some were missed, all are asked for again."""
        if (transfer := self._answered(route, message)) is None:
            return
        ticket, groups = transfer.pull.ticket, len(transfer.pull.ticket.blocks)
        expected = transfer.pull.follow and transfer.state is TransferState.READING and not transfer.complete
        if not expected or (message.lease, message.epoch) != (ticket.lease, ticket.epoch):
            self._context.counters["late_events"] += 1
            return
        told, before = transfer.told or [0] * groups, transfer.ready or (0,) * groups
        shaped = len(message.tokens) == len(message.first) == len(message.blocks) == groups
        too_many = sum(told) + sum(map(len, message.blocks)) // 4 > MAX_BLOCKS
        if not shaped or too_many or any(len(ids) % 4 for ids in message.blocks):
            error = RemoteProtocolError(f"{self._words(transfer)}: READY does not name blocks of {groups} groups")
            self._give_up(transfer, error, now)
            return
        if any(first > known for first, known in zip(message.first, told, strict=True)):
            self._send_open(transfer)
            return
        ids = [np.frombuffer(each, "<u4").astype(np.uint32) for each in message.blocks]
        news = [each[known - first :] for each, known, first in zip(ids, told, message.first, strict=True)]
        transfer.told = [known + len(each) for known, each in zip(told, news, strict=True)]
        transfer.ready = tuple(map(max, message.tokens, before))
        transfer.complete = message.complete
        if transfer.ready == before and not message.complete and not any(map(len, news)):
            return  # a repeat
        self._context.notify(BlocksReady(transfer.pull.transfer, transfer.ready, tuple(news), message.complete))

    def refused(self, route: str, message: Refused, now: float) -> None:
        if (transfer := self._answered(route, message)) is not None:
            self._give_up(transfer, RemoteProtocolError(f"{self._words(transfer)}: refused: {message.reason}"), now)

    def retry(self, number: int, now: float) -> None:
        """Repeat whatever is unanswered; every repeat is answered like the first."""
        transfer = self.transfers.get(number)
        if transfer is None or transfer.state not in (TransferState.READING, TransferState.CONFIRMING):
            return
        if not transfer.opened and transfer.state is TransferState.READING:
            self._send_open(transfer)
        for part in list(transfer.in_state(PartState.READ)):
            if part != transfer.last or transfer.state is TransferState.CONFIRMING:
                self._ask(transfer, part)
        self._context.timers.set(("retry", number), now + self._context.limits.retry)

    def renew(self, number: int, now: float) -> None:
        transfer = self.transfers.get(number)
        if transfer is None or transfer.state is TransferState.SETTLING:
            return
        every = transfer.renew_every or self._context.limits.renew
        self._context.timers.set(("renew", number), now + every)
        if transfer.pull.follow and transfer.state is TransferState.READING and not transfer.complete:
            self._send_open(transfer)  # renews as well, and is answered with what may have been missed
            return
        renewal = renew_of(transfer.pull.ticket, self._context.incarnation, transfer.incarnation)
        self._context.send(transfer.address, renewal)

    # --- endings ------------------------------------------------------------------------------------------------------

    def transfer_timeout(self, number: int, now: float) -> None:
        if (transfer := self.transfers.get(number)) is not None:
            error = PeerLost(
                f"{self._words(transfer)}: no end within {transfer.pull.timeout:g} s while {transfer.state}; "
                "is the peer alive, and is the deadline long enough for this many bytes?"
            )
            self._give_up(transfer, error, now)

    def _give_up(self, transfer: Transfer, error: PDError, now: float, *, outcome: str = "failed") -> None:
        if not transfer.step(TransferInput.GIVE_UP):
            self._context.counters["late_events"] += 1
            return
        transfer.outcome, transfer.error = outcome, error
        number, ticket = transfer.pull.transfer, transfer.pull.ticket
        for timer in ("transfer", "retry", "renew"):
            self._context.timers.cancel((timer, number))
        # Also before anything was read: the owner need not hold the blocks until the lease runs out.
        me = self._context.identity
        release = release_of(ticket, me.incarnation, me.agent, transfer.pull.readers, transfer.incarnation)
        self._context.send(transfer.address, release)
        for tag in transfer.tags:
            self._context.emit(Cancel(transfer.transport, tag))
        self._context.timers.set(("settle", number), now + self._context.limits.settle)
        self._settle(transfer, now)

    def _settle(self, transfer: Transfer, now: float) -> None:
        if not transfer.tags and transfer.step(TransferInput.QUIET):
            self._end(transfer, now)

    def settle_timeout(self, number: int, now: float) -> None:
        """A cancelled read did not settle: fence its peer; should that fail too, the blocks stay in quarantine."""
        transfer = self.transfers.get(number)
        if transfer is None or transfer.state is not TransferState.SETTLING:
            return
        peer = transfer.peer
        if peer not in self._fences.values():
            tag = self._context.new_id()
            self._fences[tag] = peer
            self._context.counters["fences"] += 1
            self._context.timers.set(("fence", tag), now + self._context.limits.fence)
            self._context.emit(Fence(peer, transfer.transport, tag))

    def fence_timeout(self, tag: int, now: float) -> None:
        if (peer := self._fences.get(tag)) is not None:
            self._context.counters["fences_timed_out"] += 1
            self.dialer.refuse(peer, now)

    def _fenced(self, event: Completed, peer: str, now: float) -> None:
        """A fence has ended every read posted to the peer before it, also one whose own completion got lost. Reads
        posted after it, and a fence that failed, need another one."""
        self._context.timers.cancel(("fence", event.tag))
        wait = self._context.limits.settle
        if event.status == "done":
            self.dialer.unsettled.discard(peer)
        else:
            self._context.counters["fences_failed"] += 1
            self.dialer.refuse(peer, now)
            wait = self._context.limits.fence
        for transfer in [transfer for transfer in self.transfers.values() if transfer.peer == peer]:
            if transfer.state is not TransferState.SETTLING:
                continue
            self._context.timers.set(("settle", transfer.pull.transfer), now + wait)
            if event.status == "done":
                for tag in [tag for tag in transfer.tags if tag < event.tag]:
                    del transfer.tags[tag], self._tags[tag]
                self._settle(transfer, now)

    def _end(self, transfer: Transfer, now: float) -> None:
        number = transfer.pull.transfer
        del self.transfers[number]
        for timer in ("transfer", "retry", "renew", "settle"):
            self._context.timers.cancel((timer, number))
        self._context.counters[f"transfers_{transfer.outcome}"] += 1
        failed = () if transfer.outcome in ("done", "abandoned") else transfer.failed_blocks()
        self._context.notify(TransferEnded(number, transfer.outcome, transfer.error, failed, transfer.stats(now)))
        self.dialer.detach(number, transfer.address, now)

    def _words(self, transfer: Transfer) -> str:
        return f"pull {transfer.pull.transfer} under {transfer.pull.ticket!r} while {transfer.state}"


def _too_long(part: Sequence[CopyPlan]) -> bool:
    return audit_bytes(part) > MAX_FRAME - _ENVELOPE


def audit_bytes(part: Sequence[CopyPlan]) -> int:
    """How large the Audit of a part becomes in a frame, rounded up."""
    return sum(plan.num_blocks * (4 + len(plan.patterns) * DIGEST_BYTES) + 80 * len(plan.patterns) + 8 for plan in part)
