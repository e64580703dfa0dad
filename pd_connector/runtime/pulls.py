"""Pulls: each is a meeting with the owner, then a transfer from every rank of it that has something for us.

A pull is done when all its transfers are: a block may be used only when every rank that it was read from said that the
lease was held. When one fails, the others are ended, and the pull ends when the last of them is quiet.

A pull that follows a growing lease plans as the owner's ranks say what is ready. When its lease ends because the owner
has to compute the blocks again, it follows the next epoch from what is confirmed on.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import numpy.typing as npt

from pd_connector.errors import LayoutMismatch, LeaseExpired, LocalProtocolError, PDError, TransferFailed
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Endpoint
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.following import Following
from pd_connector.runtime.planner import Demand, Leg, Planner

logger = logging.getLogger(__name__)

_MAX_EPOCHS = 16
"""How often an owner may begin anew before a pull that follows it gives up."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one pull is to do."""

    ticket: Ticket
    terms: bytes
    demands: Sequence[Demand]
    by_layer: bool
    priority: int
    audit: bool
    timeout: float
    deadline: float
    follow: bool = False


@dataclass(slots=True)
class _Pull:
    number: int
    order: Order
    on_end: Callable[[ev.TransferEnded], None] | None
    on_part: Callable[[int], None] | None
    begun: float
    starting: bool = True
    legs: dict[int, Leg] = field(default_factory=dict)
    """Transfers that have not ended."""
    waiting: Counter[int] = field(default_factory=Counter)
    """Per layer (or for the one part), transfers that have not confirmed it."""
    stats: list[ev.TransferStats] = field(default_factory=list)
    owners: tuple[Endpoint, ...] = ()
    following: Following | None = None
    again: int = 0
    """How often the lease was to be followed under another epoch."""
    ending: bool = False
    """The transfers of the epoch that has ended are brought to their ends."""
    met_at: float = 0.0
    told_at: float = 0.0
    """When the last of its owners said that all is ready."""
    outcome: str = "done"
    error: PDError | None = None


class Pulls:
    """``feed`` takes events for the core, ``new_id`` its numbers, ``clock`` the time in seconds."""

    def __init__(
        self,
        reader: str,
        feed: Callable[[ev.Event], None],
        new_id: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._reader, self._feed, self._new_id, self._clock = reader, feed, new_id, clock
        self._pulls: dict[int, _Pull] = {}
        self._transfers: dict[int, _Pull] = {}
        self.planner: Planner | None = None

    def start(
        self,
        order: Order,
        on_end: Callable[[ev.TransferEnded], None] | None,
        on_part: Callable[[int], None] | None,
        handle: Callable[[ev.Meet], None],
    ) -> int:
        """Returns its number. Raises LocalProtocolError for what is known to be impossible at once."""
        now, number = self._clock(), self._new_id()
        pull = self._pulls[number] = _Pull(number, order, on_end, on_part, now)
        try:
            handle(ev.Meet(number, order.ticket, order.deadline - now))
        except LocalProtocolError:
            del self._pulls[number]
            raise
        pull.starting = False
        if number not in self._pulls and isinstance(pull.error, LocalProtocolError):
            raise pull.error
        return number

    def abort(self, number: int, reason: str) -> None:
        if (pull := self._pulls.get(number)) is None:
            return
        if pull.outcome == "done":
            pull.outcome = "aborted"
        if not pull.legs:
            self._feed(ev.Abort(number, reason))
        for transfer in list(pull.legs):
            self._feed(ev.Abort(transfer, reason))

    def leasable(self, blocks: Sequence[npt.NDArray[np.uint32]]) -> dict[int, npt.NDArray[np.uint32]]:
        """As the planner has it; an agent without memory leases whatever those that it speaks for have."""
        return dict(enumerate(blocks)) if self.planner is None else self.planner.leasable(blocks)

    # --- what the core says -------------------------------------------------------------------------------------------

    def met(self, note: ev.Met) -> None:
        pull = self._pulls[note.meeting]
        pull.met_at, pull.owners = self._clock(), note.ranks
        if note.error is not None:
            self._fail(pull, note.error)
        else:
            self._begin(pull)

    def _begin(self, pull: _Pull) -> None:
        try:
            assert self.planner is not None, "memory is registered before anything is pulled"
            units: list[int] = []
            if pull.order.follow:
                legs, unread, units = self.planner.followed(pull.owners, pull.order.demands)
            else:
                legs, unread = self.planner.legs(pull.owners, pull.order.demands, pull.order.by_layer)
        except (LayoutMismatch, LocalProtocolError) as error:
            self._fail(pull, error)
            return
        except Exception as error:  # whatever a peer says of itself, whoever waits must be told
            logger.exception("no plan for %r", pull.order.ticket)
            self._fail(
                pull, TransferFailed(f"{pull.order.ticket!r} cannot be planned: {type(error).__name__}: {error}")
            )
            return
        addresses = {endpoint.rank: endpoint for endpoint in pull.owners}
        for rank, readers in unread.items():
            self._forgo(pull.order.ticket, addresses[rank], readers)
        if not legs:  # of what this rank holds nothing was asked for
            self._finish(pull)
        pull.waiting.update(itertools.chain(*(leg.layers for leg in legs)))
        for leg in legs:
            pull.legs[self._new_id()] = leg
        if pull.order.follow:
            pull.following = Following(pull.order.demands, units, pull.legs)
        for transfer, leg in list(pull.legs.items()):
            self._transfers[transfer] = pull
            self._feed(self._order(transfer, leg, pull))

    def _order(self, transfer: int, leg: Leg, pull: _Pull) -> ev.Pull:
        order = pull.order
        left = order.timeout if order.follow else max(order.deadline - self._clock(), 0.001)
        claim = leg.rank, leg.readers, order.priority, order.audit, order.terms, order.follow
        return ev.Pull(transfer, order.ticket, leg.parts, left, *claim)

    def _forgo(self, ticket: Ticket, rank: Endpoint, readers: int) -> None:
        there = msgspec.structs.replace(ticket, address=rank.address, incarnation=rank.incarnation)
        self._feed(ev.Forgo(there, self._reader, readers))

    def ready(self, note: ev.BlocksReady) -> None:
        """More can be read from one rank."""
        pull = self._transfers[note.transfer]
        assert pull.following is not None
        assert self.planner is not None
        if note.complete:
            pull.told_at = self._clock()
        try:
            demands = pull.following.more(note)
            if not demands:
                return
            part = self.planner.part(pull.owners, pull.legs[note.transfer].rank, demands)
        except Exception as error:  # whatever a peer says it has
            cause = error if isinstance(error, PDError) else TransferFailed(f"{type(error).__name__}: {error}")
            self._fail(pull, cause)
        else:
            self._feed(ev.Append(note.transfer, part, note.complete))

    def confirmed(self, note: ev.PartConfirmed) -> None:
        pull = self._transfers[note.transfer]
        if pull.following is not None:
            before = pull.following.usable[0]
            pull.following.confirmed(note.transfer, note.part)
            usable = pull.following.usable[0]
            if usable > before and pull.outcome == "done" and pull.on_part is not None:
                pull.on_part(usable)
            return
        layer = pull.legs[note.transfer].layers[note.part]
        pull.waiting[layer] -= 1
        if not pull.waiting[layer] and pull.outcome == "done" and pull.on_part is not None:
            pull.on_part(layer)

    def ended(self, note: ev.TransferEnded) -> None:
        pull = self._transfers.pop(note.transfer)
        del pull.legs[note.transfer]
        pull.stats.append(note.stats)
        again = pull.following is not None and isinstance(note.error, LeaseExpired) and note.error.again
        if again and pull.outcome == "done" and pull.again < _MAX_EPOCHS and not pull.ending:
            pull.ending = True
            for transfer in pull.legs:
                self._feed(ev.Abort(transfer, "the owner computes the blocks again"))
        if pull.ending and pull.outcome == "done" and note.outcome != "abandoned":
            if not pull.legs:
                self._follow_again(pull)
        elif note.outcome != "done":
            self._fail(pull, note.error, note.outcome)
        elif not pull.legs:
            self._finish(pull)

    def _follow_again(self, pull: _Pull) -> None:
        assert pull.following is not None
        pull.ending = False
        pull.again += 1
        order = pull.order
        ticket = msgspec.structs.replace(order.ticket, epoch=order.ticket.epoch + 1)
        pull.order = replace(order, ticket=ticket, demands=pull.following.rest())
        self._begin(pull)

    def refused(self, event: ev.Pull, error: LocalProtocolError) -> None:
        """The core did not start a transfer."""
        pull = self._transfers.pop(event.transfer)
        del pull.legs[event.transfer]
        self._fail(pull, error)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, pull: _Pull, error: PDError | None, outcome: str = "failed") -> None:
        """The first one counts; the transfers that still run are ended because of it."""
        if pull.error is None:
            pull.error = error
        if outcome == "abandoned":  # whatever else went wrong
            pull.outcome, pull.error = outcome, error
        if pull.outcome == "done":
            pull.outcome = outcome
            for transfer in pull.legs:
                self._feed(ev.Abort(transfer, "another rank's blocks cannot be had"))
        if not pull.legs:
            self._finish(pull)

    def _finish(self, pull: _Pull) -> None:
        del self._pulls[pull.number]
        if pull.starting and isinstance(pull.error, LocalProtocolError):
            return  # whoever starts it is told by raising
        failed = set() if pull.outcome in ("done", "abandoned") else self._lost_blocks(pull)
        note = ev.TransferEnded(pull.number, pull.outcome, pull.error, tuple(sorted(failed)), self._stats(pull))
        if pull.on_end is not None:
            pull.on_end(note)

    def _lost_blocks(self, pull: _Pull) -> set[int]:
        if pull.following is None or self.planner is None:
            return {block for demand in pull.order.demands for block in demand.target.tolist()}
        return pull.following.lost_blocks([group.block_tokens for group in self.planner.layout.groups])

    def _stats(self, pull: _Pull) -> ev.TransferStats:
        """Of all transfers together: they ran side by side, so the slowest counts."""
        every = pull.stats or [ev.TransferStats()]
        commit = max(one.commit for one in every)
        return ev.TransferStats(
            connect=(pull.met_at or self._clock()) - pull.begun + max(one.connect for one in every),
            wire=max(one.wire for one in every),
            waiting=max(one.waiting for one in every),
            commit=commit,
            tail=max(self._clock() - commit - pull.told_at, 0.0) if pull.told_at else 0.0,
            bytes=sum(one.bytes for one in every),
            transport="+".join(sorted({one.transport for one in every if one.transport})),
            digests_compared=sum(one.digests_compared for one in every),
        )
