"""Leases: which blocks an owner holds for readers, under which epoch, until when.

Theory of operation. The owner's table alone decides whether bytes that somebody read were held: a lease that is HELD
answers "held", everything else answers "not held". A lease ends once, for good, by whichever comes first: the last
planned reader committed or released, the deadline passed, or the owner took the blocks back. The order of an end is
always the same: the epoch ends here, transports stop serving it, and only then the engine learns that the blocks are
free; therefore no answer "held" can be given for bytes that were written over. Answers are remembered for a while, so
that a repeated COMMIT gets the answer of the first one.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any

from pd_connector.plan import Ids
from pd_connector.protocol.events import Promise


class LeaseState(StrEnum):
    HELD = "held"
    ENDED = "ended"


class LeaseInput(StrEnum):
    READER_DONE = "reader done"
    LAST_READER_DONE = "last reader done"
    RENEWED = "renewed"
    EXPIRED = "expired"
    TAKEN_BACK = "taken back"


TRANSITIONS: dict[tuple[LeaseState, LeaseInput], LeaseState] = {
    (LeaseState.HELD, LeaseInput.READER_DONE): LeaseState.HELD,
    (LeaseState.HELD, LeaseInput.RENEWED): LeaseState.HELD,
    (LeaseState.HELD, LeaseInput.LAST_READER_DONE): LeaseState.ENDED,
    (LeaseState.HELD, LeaseInput.EXPIRED): LeaseState.ENDED,
    (LeaseState.HELD, LeaseInput.TAKEN_BACK): LeaseState.ENDED,
}
"""A pair that is not listed is a late input: it is ignored, and counted by the caller."""


@dataclass(slots=True)
class Lease:
    """``deadline`` moves with renewals but never past ``cap``; both are on the owner's own clock."""

    number: int
    epoch: int
    capability: bytes
    blocks: Mapping[int, Ids]
    readers: int
    """Instances that may read. How many ranks of each do, the ranks say."""
    seconds: float
    deadline: float
    cap: float
    terms: bytes = b""
    promise: Promise | None = None
    growing: bool = False
    """Its blocks were, or are, told to followers as they became ready. These need no terms: they have the blocks from
    us."""
    complete: bool = False
    tokens: tuple[int, ...] = ()
    """Of a growing lease, how many of each group are ready."""
    again: bool = False
    """It ended, and will be granted again under the next epoch."""
    state: LeaseState = LeaseState.HELD
    reason: str = ""
    done: dict[str, Fraction] = field(default_factory=dict)
    """Who has read, and which part of its instance it is."""

    def step(self, what: LeaseInput, reason: str = "") -> bool:
        """Apply an input; True when it ended the lease."""
        after = TRANSITIONS.get((self.state, what))
        ended = after is LeaseState.ENDED
        if ended:
            self.reason = reason or str(what)
        if after is not None:
            self.state = after
        return ended


@dataclass(frozen=True, slots=True)
class Answer:
    held: bool
    reason: str = ""
    compared: int = 0


Asked = tuple[int, int, int, int, int, bytes, bytes]
"""What a COMMIT asked: (reader's incarnation, transfer, part, lease, epoch, capability, terms). All of it, because
transfer numbers repeat in the next incarnation, and nobody may leave an answer where another question looks for it."""


class Unknown(StrEnum):
    """Why a lease is not in the table."""

    NOT_YET = "not yet known here"
    GONE = "ended long ago or never granted"


class LeaseTable:
    """All leases of one owner. Lease numbers are handed out in ascending order by the engine, which is how a number
    that has not been granted yet is told from one that was forgotten."""

    def __init__(self, *, max_leases: int, remember_seconds: float, max_remembered: int) -> None:
        self._leases: dict[int, Lease] = {}
        self._ended: OrderedDict[int, tuple[float, tuple[int, str, bool]]] = OrderedDict()
        """Of an ended lease only epoch, reason, and whether it comes again are kept, not its blocks."""
        self._answers: OrderedDict[Asked, tuple[float, Answer]] = OrderedDict()
        self._highest = 0
        self._max_leases = max_leases
        self._remember_seconds = remember_seconds
        self._max_remembered = max_remembered

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def held_blocks(self) -> int:
        return sum(len(blocks) for lease in self._leases.values() for blocks in lease.blocks.values())

    def why_not(self, number: int, epoch: int) -> str | None:
        """Why a lease cannot be granted now, or None."""
        if len(self._leases) >= self._max_leases:
            return f"{len(self._leases)} leases are held, the limit is {self._max_leases} (max_leases)"
        if number in self._leases:
            return f"lease {number} is held already under epoch {self._leases[number].epoch}"
        if number in self._ended and self._ended[number][1][0] >= epoch:
            return f"lease {number} ended under epoch {self._ended[number][1][0]}; a new grant needs a higher one"
        return None

    def grant(self, lease: Lease) -> None:
        self._leases[lease.number] = lease
        self._highest = max(self._highest, lease.number)

    def get(self, number: int) -> Lease | None:
        return self._leases.get(number)

    def find(self, number: int, epoch: int, capability: bytes) -> Lease | Unknown:
        """The lease, held under this epoch and opened by this capability; or why there is none."""
        lease = self._leases.get(number)
        if lease is not None:
            if lease.epoch == epoch and hmac.compare_digest(lease.capability, capability):
                return lease
            return Unknown.NOT_YET if lease.epoch < epoch else Unknown.GONE
        if number in self._ended:
            return Unknown.NOT_YET if self._ended[number][1][0] < epoch else Unknown.GONE
        return Unknown.NOT_YET if number > self._highest else Unknown.GONE

    def end(self, lease: Lease, now: float) -> None:
        """Move an ended lease out of the table."""
        del self._leases[lease.number]
        self._ended.pop(lease.number, None)
        self._ended[lease.number] = (now, (lease.epoch, lease.reason, lease.again))
        self._forget(self._ended, now)

    def reason_of(self, number: int) -> str:
        return self._ended[number][1][1] if number in self._ended else str(Unknown.GONE)

    def end_for_good(self, number: int, reason: str, now: float) -> None:
        """No further epoch will come of a lease that has ended."""
        self._ended[number] = (now, (2**32 - 1, reason, False))

    def comes_again(self, number: int) -> bool:
        return number in self._ended and self._ended[number][1][2]

    def all(self) -> list[Lease]:
        return list(self._leases.values())

    def remember(self, asked: Asked, answer: Answer, now: float) -> None:
        self._answers[asked] = (now, answer)
        self._forget(self._answers, now)

    def recall(self, asked: Asked) -> Answer | None:
        entry = self._answers.get(asked)
        return entry[1] if entry else None

    def _forget(self, memory: OrderedDict[Any, tuple[float, Any]], now: float) -> None:
        while memory:
            when, _ = next(iter(memory.values()))
            if len(memory) <= self._max_remembered and when > now - self._remember_seconds:
                return
            memory.popitem(last=False)
