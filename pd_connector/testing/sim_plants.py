"""Planted faults: each takes one promise of the protocol, or of staging slots, away, and the simulation must notice.

They patch the product's classes for as long as the context lasts; its code knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from pd_connector.errors import ConfigError
from pd_connector.protocol.core import Core
from pd_connector.protocol.events import Append, TransferEnded
from pd_connector.protocol.lease import Answer
from pd_connector.protocol.messages import Commit, Opened, Refused, Verdict
from pd_connector.protocol.owner import LeaseRequest, Owner
from pd_connector.protocol.reader import Reader
from pd_connector.protocol.transfer import Transfer, TransferInput, TransferState
from pd_connector.transport.staging import Loan, SlotTable


@contextmanager
def use_without_verdict() -> Iterator[None]:
    """A transfer is done when its reads are, whatever the owner says."""
    advance = Reader._advance

    def planted(self: Reader, transfer: Transfer, now: float) -> None:
        advance(self, transfer, now)
        if transfer.state is TransferState.CONFIRMING:
            transfer.step(TransferInput.HELD)
            transfer.outcome = "done"
            self._end(transfer, now)

    with patch.object(Reader, "_advance", planted):
        yield


@contextmanager
def commit_after_epoch_end() -> Iterator[None]:
    """The owner says "held" of a lease that it remembers, although its epoch has ended."""
    not_held = Owner._not_held

    def planted(self: Owner, route: str, message: LeaseRequest) -> None:
        if (
            isinstance(message, Commit)
            and self.table._ended.get(message.lease, (0, (0, "", False)))[1][0] == message.epoch
        ):
            self._verdict(route, message, Answer(True))
        else:
            not_held(self, route, message)

    with patch.object(Owner, "_not_held", planted):
        yield


@contextmanager
def reuse_before_settled() -> Iterator[None]:
    """An abandoned transfer ends at once, while its reads may still write."""

    def planted(self: Reader, transfer: Transfer, now: float) -> None:
        if transfer.step(TransferInput.QUIET):
            self._end(transfer, now)

    with patch.object(Reader, "_settle", planted):
        yield


@contextmanager
def accept_stale_incarnation() -> Iterator[None]:
    """Neither side looks at incarnations in messages any more."""

    def believed(self: Reader, route: str, message: Opened | Verdict | Refused) -> Transfer | None:
        return self.transfers.get(message.transfer)

    with (
        patch.object(Core, "is_for_us", lambda self, message: True),
        patch.object(Reader, "_answered", believed),
    ):
        yield


@contextmanager
def end_twice() -> Iterator[None]:
    """A verdict or completion that comes after the end of its transfer ends it once more."""
    ended: dict[tuple[Reader, int], TransferEnded] = {}
    tags: dict[tuple[Reader, int], int] = {}
    end, verdict, completed = Reader._end, Reader.verdict, Reader.completed

    def planted_end(self: Reader, transfer: Transfer, now: float) -> None:
        number = transfer.pull.transfer
        ended[self, number] = TransferEnded(number, transfer.outcome, transfer.error)
        end(self, transfer, now)

    def planted_verdict(self: Reader, route: str, message: Verdict, now: float) -> None:
        if (self, message.transfer) in ended:
            self._context.notify(ended[self, message.transfer])
        verdict(self, route, message, now)

    def planted_completed(self: Reader, event: Any, now: float) -> None:
        if event.tag in self._tags:
            tags[self, event.tag] = self._tags[event.tag]
        elif (again := ended.get((self, tags.get((self, event.tag), 0)))) is not None:
            self._context.notify(again)
        completed(self, event, now)

    with (
        patch.object(Reader, "_end", planted_end),
        patch.object(Reader, "verdict", planted_verdict),
        patch.object(Reader, "completed", planted_completed),
    ):
        yield


@contextmanager
def done_while_more() -> Iterator[None]:
    """A transfer that follows takes every part for the last one."""
    append = Reader.append

    def planted(self: Reader, event: Append, now: float) -> None:
        append(self, replace(event, last=True), now)

    with patch.object(Reader, "append", planted):
        yield


@contextmanager
def reuse_slot_before_return() -> Iterator[None]:
    """A staging slot is lent again as soon as it was filled, before its reader has read it and given it back."""
    filled, leave = SlotTable.filled, SlotTable._leave

    def planted_filled(self: SlotTable[Any], loan: Loan[Any], now: float) -> bool:
        held = filled(self, loan, now)
        if held:
            leave(self, loan)
        return held

    def planted_leave(self: SlotTable[Any], loan: Loan[Any]) -> None:
        if loan.deadline is None:
            leave(self, loan)

    with patch.object(SlotTable, "filled", planted_filled), patch.object(SlotTable, "_leave", planted_leave):
        yield


PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "use-without-verdict": use_without_verdict,
    "commit-after-epoch-end": commit_after_epoch_end,
    "reuse-before-settled": reuse_before_settled,
    "accept-stale-incarnation": accept_stale_incarnation,
    "end-twice": end_twice,
    "done-while-more": done_while_more,
    "reuse-slot-before-return": reuse_slot_before_return,
}


def planted(name: str) -> AbstractContextManager[None]:
    """The planted fault of that name; nothing for an empty one. Raises ConfigError for a name that is not known."""
    if not name:
        return nullcontext()
    if name not in PLANTS:
        raise ConfigError(f"no planted fault is called {name!r}; there are {', '.join(PLANTS)}")
    return PLANTS[name]()
