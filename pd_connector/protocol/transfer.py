"""Transfers: one pull of leased blocks, as the reader sees it.

Theory of operation. A transfer waits until its peer is READY, posts the reads of its parts, asks the owner for a
verdict on each part once it is read, and is done when the verdict on the last one (the COMMIT) is "held". Anything that
goes wrong before that is GIVE_UP: reads still posted are cancelled and the transfer stays SETTLING, its destination
blocks in quarantine, until the transport has confirmed that none of them can write any more. A transfer ends exactly
once; whatever arrives afterwards finds no transfer and is counted as late.

A transfer that follows a growing lease gets its parts one by one; until the last has come none is final, and all are
confirmed alike.

CONFIRMING covers the final verdict alone: "held" for the last part implies it for all, because the epoch is unbroken.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pd_connector.errors import PDError
from pd_connector.layout import KVLayout
from pd_connector.plan import CopyPlan
from pd_connector.protocol.events import Pull, TransferStats


class TransferState(StrEnum):
    CONNECTING = "connecting"
    READING = "reading"
    CONFIRMING = "confirming"
    SETTLING = "settling"
    ENDED = "ended"


class TransferInput(StrEnum):
    PEER_READY = "peer ready"
    ALL_READ = "all parts read"
    HELD = "verdict: held"
    GIVE_UP = "give up"  # abort, failure, not held, deadline: the outcome is kept beside the state
    QUIET = "no read outstanding"


TRANSITIONS: dict[tuple[TransferState, TransferInput], TransferState] = {
    (TransferState.CONNECTING, TransferInput.PEER_READY): TransferState.READING,
    (TransferState.READING, TransferInput.ALL_READ): TransferState.CONFIRMING,
    (TransferState.CONFIRMING, TransferInput.HELD): TransferState.ENDED,
    (TransferState.CONNECTING, TransferInput.GIVE_UP): TransferState.SETTLING,
    (TransferState.READING, TransferInput.GIVE_UP): TransferState.SETTLING,
    (TransferState.CONFIRMING, TransferInput.GIVE_UP): TransferState.SETTLING,
    (TransferState.SETTLING, TransferInput.QUIET): TransferState.ENDED,
}
"""A pair that is not listed is a late input: it is ignored, and counted by the caller."""


class PartState(StrEnum):
    PENDING = "pending"
    POSTED = "posted"
    READ = "read"
    CONFIRMED = "confirmed"


@dataclass(slots=True)
class Transfer:
    pull: Pull
    started: float
    address: str
    incarnation: int
    """Which session the transfer is on: the ticket's, then that of the owner's rank."""
    deadline: float
    layout: KVLayout | None = None
    """What the owner's rank must have by the word of whoever speaks for it."""
    state: TransferState = TransferState.CONNECTING
    parts: list[PartState] = field(default_factory=list)
    plans: list[tuple[CopyPlan, ...]] = field(default_factory=list)
    tags: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Posted reads: tag → (part, number of the plan in it)."""
    unread: dict[int, int] = field(default_factory=dict)
    """Plans of posted parts that have not been read."""
    parked: list[tuple[int, int]] = field(default_factory=list)
    """Reads of leases that the owner's transport does not know yet; posted again when OPENED says so."""
    jobs: dict[int, int] = field(default_factory=dict)
    """Running digests: job → part. They only read the destination, which nobody reuses before the end."""
    digests: dict[int, bytes] = field(default_factory=dict)
    transport: str = ""
    peer: str = ""
    opened: bool = False
    reposted: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Reads that were refused because the owner's transport did not know the lease."""
    more: bool = False
    """Parts may still be added."""
    told: list[int] = field(default_factory=list)
    """Of a transfer that follows: blocks of each group that the owner named so far."""
    ready: tuple[int, ...] = ()
    complete: bool = False
    """The owner has named all."""
    renew_every: float = 0.0
    outcome: str = ""
    error: PDError | None = None
    ready_at: float = 0.0
    reading_since: float = 0.0
    reading: float = 0.0
    """Seconds in which at least one read was posted, until the last time that none was."""
    read_at: float = 0.0
    compared: int = 0

    def __post_init__(self) -> None:
        self.plans = list(self.pull.parts)
        self.parts = [PartState.PENDING] * len(self.plans)
        self.more = self.pull.follow

    def step(self, what: TransferInput) -> bool:
        """Apply an input; True when the state changed."""
        after = TRANSITIONS.get((self.state, what))
        if after is None:
            return False
        self.state = after
        return True

    def in_state(self, state: PartState) -> Iterator[int]:
        return (part for part, current in enumerate(self.parts) if current is state)

    @property
    def last(self) -> int:
        """The part whose verdict is final; behind all of them while more may come."""
        return len(self.parts) - (0 if self.more else 1)

    def failed_blocks(self) -> tuple[int, ...]:
        """Destination blocks that hold nothing of value: all of them, since parts may each cover every block."""
        blocks: set[int] = set()
        for plan in itertools.chain(*self.plans):
            blocks.update(plan.blocks(1).tolist())
        return tuple(sorted(blocks))

    def stats(self, now: float) -> TransferStats:
        ready = self.ready_at or now
        read = self.read_at or now
        return TransferStats(
            connect=ready - self.started,
            wire=self.reading,
            waiting=max(read - ready - self.reading, 0.0),
            commit=now - read,
            bytes=sum(plan.num_bytes for plan in itertools.chain(*self.plans)),
            transport=self.transport,
            digests_compared=self.compared,
        )
