"""What goes into the core (events) and what comes out of it (commands, notes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pd_connector.errors import PDError
from pd_connector.plan import CopyPlan, Ids, Side
from pd_connector.protocol.messages import Account, Endpoint, Message, Saved
from pd_connector.protocol.ticket import Ticket

Route = str
"""Where a frame came from or goes to: an address that was dialled, or a name for who dialled us."""


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    route: Route
    frame: bytes


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The control connection to a dialled address broke."""

    route: Route
    reason: str


@dataclass(frozen=True, slots=True)
class Connected:
    """Answer to Connect: ``transport`` was chosen and works; or ``error`` says why none does."""

    peer: str
    transport: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Completed:
    """A transport's terminal answer to a tag; ``status`` is one of transport.base.Status' values, or "abandoned" for
    what is left of transports that closed and are that."""

    tag: int
    status: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Digested:
    """Answer to DigestBlocks; None when the blocks could not be read."""

    job: int
    digests: bytes | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Meet:
    """Greet whoever a ticket names, to learn which ranks there are and what memory they have; answered by Met.
    ``meeting`` comes from Core.new_id()."""

    meeting: int
    ticket: Ticket
    timeout: float


@dataclass(frozen=True, slots=True)
class Pull:
    """Read blocks of a ticket from one rank of its owner. ``parts`` are read in order and confirmed one by one;
    ``transfer`` comes from Core.new_id(). ``rank`` picks the owner's rank where the ticket's address only speaks for
    ranks; ``readers`` ranks of our instance end the lease of that rank."""

    transfer: int
    ticket: Ticket
    parts: tuple[tuple[CopyPlan, ...], ...]
    timeout: float
    rank: int = 0
    readers: int = 1
    priority: int = 0
    audit: bool = False
    terms: bytes = b""
    follow: bool = False
    """Parts come later, by Append, as BlocksReady tells of blocks; ``timeout`` is for each wait between them."""


@dataclass(frozen=True, slots=True)
class Append:
    """One more part for a transfer that follows; ``last`` if none comes after it."""

    transfer: int
    part: tuple[CopyPlan, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Abort:
    transfer: int
    reason: str = "aborted by the caller"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a lease will cover in the end."""

    tokens: int
    key: bytes
    groups: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Lease blocks (ids per group) to ``readers`` distinct readers for ``seconds``, renewable up to ``cap_seconds``.
    ``terms`` are those of the ticket that was given out; a reader with others is told "not held". ``promise`` is what
    whoever awaits the capability is told; ``growing`` leases get their blocks, and terms, by Grow."""

    number: int
    epoch: int
    capability: bytes
    blocks: Mapping[int, Ids]
    readers: int
    seconds: float
    cap_seconds: float
    terms: bytes = b""
    promise: Promise | None = None
    growing: bool = False


@dataclass(frozen=True, slots=True)
class Grow:
    """A growing lease now has these blocks (all of them, per group), of which ``tokens[g]`` tokens of group g may be
    read. ``complete``: it grows no more, and is under ``terms`` like any other."""

    number: int
    blocks: Mapping[int, Ids]
    tokens: tuple[int, ...]
    complete: bool
    terms: bytes = b""


@dataclass(frozen=True, slots=True)
class End:
    """The owner takes the blocks back; ``again`` if it will grant the same lease under the next epoch."""

    number: int
    reason: str
    again: bool = False


@dataclass(frozen=True, slots=True)
class Deny:
    """The owner will not grant a lease under this capability: whoever awaits it is told."""

    capability: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Extend:
    """The owner prolongs a lease itself (a renewal that arrived by another way)."""

    number: int


@dataclass(frozen=True, slots=True)
class Forgo:
    """Tell a ticket's owner that ``reader``, one of ``readers``, will not read under it; an empty name speaks for every
    reader."""

    ticket: Ticket
    reader: str = ""
    readers: int = 1


@dataclass(frozen=True, slots=True)
class Keep:
    """Renew a ticket's lease until Drop, a refusal, or ``seconds`` have passed."""

    ticket: Ticket
    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Expect:
    """Ask whoever answers at ``address`` for the lease under ``capability``, until it is granted, refused, Disclaimed,
    or ``seconds`` have passed; answered by Promised."""

    address: str
    capability: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Disclaim:
    """Expect a capability no more; ``renounce`` also tells ``address`` that nobody will read under it."""

    address: str
    capability: bytes
    renounce: bool


@dataclass(frozen=True, slots=True)
class Inform:
    """Tell whoever answers at ``address``, once; nobody minds when it is lost."""

    address: str
    message: Account | Saved


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work; a Drained note follows when nothing is leased and nothing is being read."""


@dataclass(frozen=True, slots=True)
class Close:
    """End everything now. Reads still posted must be settled by the transports' close()."""


Event = (
    Received | Disconnected | Connected | Completed | Digested | Tick | Meet | Pull | Append | Abort | Grant | Grow
    | End | Deny | Extend | Forgo | Keep | Drop | Expect | Disclaim | Inform | Drain | Close
)  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    route: Route
    message: Message


@dataclass(frozen=True, slots=True)
class Hangup:
    """The dialled connection is not needed any more."""

    route: Route


@dataclass(frozen=True, slots=True)
class Connect:
    """Choose a transport for a peer and connect it; answered by Connected."""

    peer: str
    transports: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Disconnect:
    peer: str


@dataclass(frozen=True, slots=True)
class PostRead:
    peer: str
    transport: str
    number: int
    epoch: int
    capability: bytes
    plan: CopyPlan
    tag: int
    priority: int


@dataclass(frozen=True, slots=True)
class Cancel:
    transport: str
    tag: int


@dataclass(frozen=True, slots=True)
class Fence:
    peer: str
    transport: str
    tag: int


@dataclass(frozen=True, slots=True)
class GrantBlocks:
    number: int
    epoch: int
    capability: bytes
    blocks: Mapping[int, Ids]


@dataclass(frozen=True, slots=True)
class RevokeBlocks:
    number: int
    epoch: int


@dataclass(frozen=True, slots=True)
class DigestBlocks:
    """Digest our own memory: each place in each block of each side. Answered by Digested."""

    job: int
    sides: tuple[Side, ...]


@dataclass(frozen=True, slots=True)
class Notify:
    note: Note


Command = (
    Send
    | Hangup
    | Connect
    | Disconnect
    | PostRead
    | Cancel
    | Fence
    | GrantBlocks
    | RevokeBlocks
    | DigestBlocks
    | Notify
)


# --- notes to the embedding engine ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Seconds spent in each stage of a pull, and what was moved. ``wire``: while something was being read; ``waiting``:
    between reads, for blocks to become ready; ``tail``: from when the last blocks were known to be ready to when all
    were read (0 unless the lease grew)."""

    connect: float = 0.0
    wire: float = 0.0
    waiting: float = 0.0
    commit: float = 0.0
    tail: float = 0.0
    bytes: int = 0
    transport: str = ""
    digests_compared: int = 0


@dataclass(frozen=True, slots=True)
class Met:
    """Exactly one per Meet: the owner's ranks, in order of their numbers; or why nobody was met."""

    meeting: int
    ranks: tuple[Endpoint, ...] = ()
    error: PDError | None = None


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """The owner of a lease that a transfer follows has ``tokens[g]`` tokens of group g ready, and these further blocks
    of it. Exactly one of a transfer's is ``complete``, and its last."""

    transfer: int
    tokens: tuple[int, ...]
    blocks: tuple[Ids, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class Promised:
    """Exactly one per Expect that is not disclaimed: the ticket, without blocks, of a lease that is held now; or why
    there is none."""

    address: str
    capability: bytes
    ticket: Ticket | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PartConfirmed:
    """The owner confirmed that the lease held while part ``part`` was read: its bytes may be used."""

    transfer: int
    part: int


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """Exactly one per Pull. ``outcome`` is done, failed, aborted or abandoned. The destination is quiet whatever it is,
    but for abandoned (see errors.Abandoned)."""

    transfer: int
    outcome: str
    error: PDError | None = None
    failed_blocks: tuple[int, ...] = ()
    stats: TransferStats = field(default_factory=TransferStats)


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Exactly one per granted lease: the epoch has ended, no transport serves it, the blocks are the engine's again."""

    number: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    number: int
    epoch: int


@dataclass(frozen=True, slots=True)
class TicketLost:
    """The owner said that a kept ticket's lease is over."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Informed:
    """Somebody told us; whether it is about anything of ours is the engine's to see."""

    message: Account | Saved


@dataclass(frozen=True, slots=True)
class Drained:
    pass


Note = (
    Met | BlocksReady | PartConfirmed | TransferEnded | LeaseEnded | LeaseRenewed | TicketLost | Promised | Informed
    | Drained
)  # fmt: skip
