"""The staging slots of an owner: who holds which, since when, and whether what was read from it counts. Pure.

    waiting ──lend──▶ being filled ──filled──▶ lent ──give_back──▶ free   HELD
                            │                    ├──revoke──▶ free        REVOKED
                            │                    └──expire──▶ free        LATE
                            └──revoke: void, free when the filling is over

A slot is leased memory: every loan of it has an epoch of its own, and once that epoch ended no answer can revive it. A
reader's bytes count only if its epoch had not ended when it gave the slot back, that is, after it read them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from pd_connector.transport.base import LeaseId

T = TypeVar("T")
Key = tuple[int, int]
"""Slot and epoch."""

ENDED = 1024
"""Loans whose end is remembered, to say it to readers that come late."""


class Verdict(Enum):
    HELD = "held"
    REVOKED = "revoked"
    LATE = "late"
    UNKNOWN = "unknown"


@dataclass(slots=True, eq=False)
class Loan(Generic[T]):
    slot: int
    epoch: int
    reader: Hashable
    lease: LeaseId
    request: T
    deadline: float | None = None
    """By when it must come back; None while it is being filled."""
    void: bool = False
    """Its block lease was revoked while it was being filled."""

    @property
    def key(self) -> Key:
        return self.slot, self.epoch


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T]):
    lease: LeaseId
    request: T
    deadline: float


class SlotTable(Generic[T]):
    """``slots`` numbers from 0 on. A loan ends ``hold_s`` after its bytes were ready, a request after it waited
    ``wait_s``; ``most_waiting`` requests of one reader wait, and ``most_waiting_in_all`` of all."""

    def __init__(
        self, slots: int, hold_s: float, wait_s: float, most_waiting: int = 64, most_waiting_in_all: int = 4096
    ) -> None:
        self._hold_s, self._wait_s = hold_s, wait_s
        self._most_waiting, self._most_in_all = most_waiting, most_waiting_in_all
        self._share = share(slots)
        self._free = deque(range(slots))
        self._epochs = [0] * slots
        self._loans: dict[Key, Loan[T]] = {}
        self._ended: OrderedDict[Key, tuple[Hashable, Verdict]] = OrderedDict()
        self._waiting: OrderedDict[Hashable, deque[_Waiting[T]]] = OrderedDict()  # whose turn is next comes first
        self._num_waiting = 0
        self._held: Counter[Hashable] = Counter()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ask(self, reader: Hashable, lease: LeaseId, request: T, now: float) -> bool:
        """Wait for a slot; False when too many do."""
        queue = self._waiting.get(reader, ())
        if len(queue) >= self._most_waiting or self._num_waiting >= self._most_in_all:
            return False
        self._waiting.setdefault(reader, deque()).append(_Waiting(lease, request, now + self._wait_s))
        self._num_waiting += 1
        return True

    def lend(self) -> Loan[T] | None:
        """A slot to fill, if there is one and somebody may have it: of those who wait, in turn, who holds the fewest.
        Nobody holds more than a share, so that a reader which died with its slots does not stop the others."""
        if not self._free:
            return None
        able = [reader for reader in self._waiting if self._held[reader] < self._share]
        if not able:
            return None
        reader = min(able, key=lambda each: self._held[each])
        waiting = self._take(reader)
        slot = self._free.popleft()
        self._epochs[slot] += 1
        loan = Loan(slot, self._epochs[slot], reader, waiting.lease, waiting.request)
        self._loans[loan.key] = loan
        self._held[reader] += 1
        return loan

    def filled(self, loan: Loan[T], now: float) -> bool:
        """The bytes are in the slot. False when the block lease was revoked meanwhile: the slot is free again."""
        if loan.void:
            self.drop(loan)
            return False
        loan.deadline = now + self._hold_s
        return True

    def drop(self, loan: Loan[T]) -> None:
        """End a loan of which nobody was told, or nobody could be."""
        if self._loans.pop(loan.key, None) is not None:
            self._leave(loan)

    def give_back(self, reader: Hashable, slot: int, epoch: int) -> Verdict:
        """The one answer to a reader that has read a slot; only HELD makes its bytes count."""
        loan = self._loans.get((slot, epoch))
        if loan is not None and loan.reader == reader and loan.deadline is not None:
            self.drop(loan)
            return Verdict.HELD
        owner, verdict = self._ended.pop((slot, epoch), (None, Verdict.UNKNOWN))
        return verdict if owner == reader else Verdict.UNKNOWN

    def revoke(self, lease: LeaseId) -> list[Loan[T]]:
        """A block lease ended: the loans that ended with it. Those still being filled end when they are."""
        ended = [loan for loan in self._loans.values() if loan.lease == lease]
        for loan in ended:
            loan.void = True
        return [self._end(loan, Verdict.REVOKED) for loan in ended if loan.deadline is not None]

    def expire(self, now: float) -> tuple[list[Loan[T]], list[tuple[Hashable, T]]]:
        """What ended by time: loans that were not given back, and the requests (with their readers) that waited."""
        late = [loan for loan in self._loans.values() if loan.deadline is not None and loan.deadline <= now]
        waited = []
        for reader in list(self._waiting):
            while (queue := self._waiting.get(reader)) and queue[0].deadline <= now:
                waited.append((reader, self._take(reader).request))
        return [self._end(loan, Verdict.LATE) for loan in late], waited

    def forget(self, reader: Hashable) -> list[Loan[T]]:
        """A reader is known to be gone: the loans that ended with it."""
        self._num_waiting -= len(self._waiting.pop(reader, ()))
        gone = [loan for loan in self._loans.values() if loan.reader == reader and loan.deadline is not None]
        for loan in gone:
            self.drop(loan)
        return gone

    def next_deadline(self) -> float | None:
        deadlines = [loan.deadline for loan in self._loans.values() if loan.deadline is not None]
        deadlines += [queue[0].deadline for queue in self._waiting.values()]
        return min(deadlines, default=None)

    def _take(self, reader: Hashable) -> _Waiting[T]:
        queue = self._waiting[reader]
        waiting = queue.popleft()
        self._num_waiting -= 1
        self._waiting.move_to_end(reader)
        if not queue:
            del self._waiting[reader]
        return waiting

    def _end(self, loan: Loan[T], verdict: Verdict) -> Loan[T]:
        self.drop(loan)
        self._ended[loan.key] = loan.reader, verdict
        if len(self._ended) > ENDED:
            self._ended.popitem(last=False)
        return loan

    def _leave(self, loan: Loan[T]) -> None:
        self._free.append(loan.slot)
        self._held[loan.reader] -= 1
        if not self._held[loan.reader]:
            del self._held[loan.reader]


def share(slots: int) -> int:
    """The most slots for one reader: half of them, but two, where there are two, so that one is filled while the other
    is read."""
    return min(slots, max(2, slots // 2))
