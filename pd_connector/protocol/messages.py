"""Messages of the side channel: versioned tagged structs with strict bounds, plain MessagePack maps on the wire.

Every message names the sender's incarnation (``src``) and the incarnation it is meant for (``dst``; 0 in a Hello, whose
sender does not know it yet). Durations are milliseconds; no wall-clock time ever crosses the wire. The stamps of an
Account are nanoseconds of CLOCK_MONOTONIC, worth something to who has the same clock.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pd_connector.errors import RemoteProtocolError
from pd_connector.layout import KVLayout, Size
from pd_connector.plan import MAX_DIMS

VERSION = 4
MAX_FRAME = 4 * 2**20
"""Largest frame that is sent or accepted, in bytes: 500,000 audit digests fit."""
MAX_SAVED = 2**20
"""Largest ticket of a kept turn, in bytes: of some 200,000 blocks."""
MAX_WORDS = 4096
MAX_RANKS = 4096
MAX_GROUPS = 64
CAPABILITY_BYTES = 16
DIGEST_BYTES = 8
TERMS_BYTES = 16

U64 = Annotated[int, Meta(ge=0)]  # MessagePack itself ends at 2**64 - 1
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Terms = Annotated[bytes, Meta(max_length=TERMS_BYTES)]
"""Digest of what the reader's ticket says about the lease (Ticket.terms)."""
Millis = Annotated[int, Meta(ge=0, le=2**40)]
Name = Annotated[str, Meta(max_length=256)]
Readers = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Words = Annotated[str, Meta(max_length=MAX_WORDS)]
Capability = Annotated[bytes, Meta(min_length=CAPABILITY_BYTES, max_length=CAPABILITY_BYTES)]


class Endpoint(msgspec.Struct, frozen=True):
    """Where one rank of an instance listens, which incarnation answers there and what memory it has."""

    rank: U32
    address: Name
    incarnation: U64
    layout: KVLayout


class AuditPlan(msgspec.Struct, frozen=True):
    """What one plan read of the owner's memory: ``blocks`` (little-endian u32 each), and of each of them ``places``:
    (grid in the owner's canonical order, offset, bytes of a run, repetitions as (count, stride))."""

    blocks: Annotated[bytes, Meta(max_length=MAX_FRAME)]
    places: Annotated[
        tuple[tuple[U32, Size, Size, Annotated[tuple[tuple[Size, Size], ...], Meta(max_length=MAX_DIMS)]], ...],
        Meta(min_length=1, max_length=16384),
    ]


class Audit(msgspec.Struct, frozen=True):
    """Digests of what was read: for every plan, place and block, in this order, DIGEST_BYTES bytes of ``digests``."""

    plans: Annotated[tuple[AuditPlan, ...], Meta(max_length=4096)]
    digests: Annotated[bytes, Meta(max_length=MAX_FRAME)]


class Message(msgspec.Struct, tag_field="kind", frozen=True, kw_only=True):
    src: U64
    dst: U64


class Introduction(Message, frozen=True, kw_only=True):
    """What an agent says of itself. ``layout`` is None for an agent without memory (a router, a scheduler side)."""

    version: U32
    agent: Name
    model: Name
    layout: KVLayout | None
    transports: Annotated[dict[Name, Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=16)]


class Hello(Introduction, tag="hello", frozen=True, kw_only=True):
    pass


class Welcome(Introduction, tag="welcome", frozen=True, kw_only=True):
    """Answer to Hello. ``refused`` is empty or says why no blocks can be exchanged; ``directory`` lists the ranks of an
    instance when the answering agent only speaks for them."""

    refused: Words = ""
    directory: Annotated[tuple[Endpoint, ...], Meta(max_length=MAX_RANKS)] = ()


class Open(Message, tag="open", frozen=True, kw_only=True):
    """A reader announces a transfer under a lease, and over which transport it will read. ``readers`` is how many ranks
    of its instance will end this lease, here and in Commit and Release. With ``follow`` it wants to be told of blocks
    as they become ready, from the first on."""

    transfer: U64
    lease: U64
    epoch: U32
    capability: Capability
    reader: Name
    transport: Name
    readers: Readers = 1
    terms: Terms = b""
    follow: bool = False


class Opened(Message, tag="opened", frozen=True, kw_only=True):
    """Answer to Open. Whoever follows is told without asking when the lease ends before it is complete (not ``held``);
    with ``again`` it will be granted once more, under the next epoch."""

    transfer: U64
    held: bool
    reason: Words = ""
    remaining_ms: Millis = 0
    again: bool = False


class Ready(Message, tag="ready", frozen=True, kw_only=True):
    """Blocks of a growing lease hold what they are to hold: the first ``tokens[g]`` tokens of group g. ``blocks[g]``
    are ids (little-endian u32 each) of its blocks from number ``first[g]`` on; with ``complete`` these are the last."""

    transfer: U64
    lease: U64
    epoch: U32
    tokens: Annotated[tuple[U32, ...], Meta(max_length=MAX_GROUPS)]
    first: Annotated[tuple[U32, ...], Meta(max_length=MAX_GROUPS)]
    blocks: Annotated[tuple[Annotated[bytes, Meta(max_length=MAX_FRAME)], ...], Meta(max_length=MAX_GROUPS)]
    complete: bool


class Await(Message, tag="await", frozen=True, kw_only=True):
    """Whoever holds this capability wants to know when a lease is granted under it. ``dst`` may be 0: the asker knows
    an address, not yet who answers there."""

    capability: Capability


class Granted(Message, tag="granted", frozen=True, kw_only=True):
    """Answer to Await, once there is one: the lease, how many tokens it will cover in how many KV cache groups, and
    under which prefix key; or why there will be none."""

    capability: Capability
    held: bool
    reason: Words = ""
    lease: U64 = 0
    epoch: U32 = 0
    tokens: U32 = 0
    key: Annotated[bytes, Meta(max_length=64)] = b""
    groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)] = 1


class Renounce(Message, tag="renounce", frozen=True, kw_only=True):
    """Nobody will read under the lease of this capability, be it granted already or not yet. ``dst`` may be 0."""

    capability: Capability


class PrefillTimes(msgspec.Struct, tag="prefill", frozen=True, kw_only=True):
    """When a prefill instance's engine had the request, scheduled it first, and had its prompt computed (0: never); and
    of how many prompt tokens it loaded how many instead of computing them."""

    arrived: U64
    scheduled: U64 = 0
    computed: U64 = 0
    prompt: U32 = 0
    expected: U32 = 0
    loaded: U32 = 0


class DecodeTimes(msgspec.Struct, tag="decode", frozen=True, kw_only=True):
    """When a decode instance's engine had the request, had blocks for it and ordered the load, knew of the last blocks
    that were to be read, had read and confirmed them, and scheduled the request first (0: never). ``reading``: ns spent
    reading in all. Of its prompt tokens so many were here before, should have been loaded, were loaded."""

    arrived: U64
    ordered: U64 = 0
    announced: U64 = 0
    read: U64 = 0
    confirmed: U64 = 0
    scheduled: U64 = 0
    reading: U64 = 0
    prompt: U32 = 0
    cached: U32 = 0
    expected: U32 = 0
    loaded: U32 = 0


class Account(Message, tag="account", frozen=True, kw_only=True):
    """What one instance tells whoever brokered a hand-over, and asked for it by naming ``of``: where the time went.
    ``clock`` names the clock of its stamps. ``dst`` may be 0."""

    of: Capability
    clock: Name
    times: PrefillTimes | DecodeTimes


class Saved(Message, tag="saved", frozen=True, kw_only=True):
    """What a decode instance kept of a request, for whoever brokered it as ``of``: a ticket (as Ticket.to_bytes) for
    the next turn of the conversation, held for so long; empty, with the reason, when it kept nothing. ``dst`` may be 0.
    """

    of: Capability
    ticket: Annotated[bytes, Meta(max_length=MAX_SAVED)] = b""
    remaining_ms: Millis = 0
    reason: Words = ""


class Commit(Message, tag="commit", frozen=True, kw_only=True):
    """Was the lease held until now? ``final`` also releases it for this reader; without it, it is a CHECK."""

    transfer: U64
    part: U32
    lease: U64
    epoch: U32
    capability: Capability
    reader: Name
    final: bool
    readers: Readers = 1
    audit: Audit | None = None
    terms: Terms = b""


class Verdict(Message, tag="verdict", frozen=True, kw_only=True):
    """Answer to Commit; ``compared`` counts the audit digests that were compared, ``again`` is as in Opened."""

    transfer: U64
    part: U32
    held: bool
    reason: Words = ""
    compared: U32 = 0
    again: bool = False


class Renew(Message, tag="renew", frozen=True, kw_only=True):
    lease: U64
    epoch: U32
    capability: Capability


class Renewed(Message, tag="renewed", frozen=True, kw_only=True):
    lease: U64
    epoch: U32
    held: bool
    remaining_ms: Millis = 0


class Release(Message, tag="release", frozen=True, kw_only=True):
    """The reader (or, with an empty name, whoever brokers the hand-over) does not need the lease any more."""

    lease: U64
    epoch: U32
    capability: Capability
    reader: Name = ""
    readers: Readers = 1


class Stale(Message, tag="stale", frozen=True, kw_only=True):
    """Whoever was meant by ``incarnation`` is gone; ``src`` is who answers at this address now."""

    incarnation: U64


class Refused(Message, tag="refused", frozen=True, kw_only=True):
    """A bound of the receiver would be exceeded; ``transfer`` is what it was about."""

    transfer: U64
    reason: Words


class Bye(Message, tag="bye", frozen=True, kw_only=True):
    """The sender closes now."""


AnyMessage = (
    Hello | Welcome | Open | Opened | Ready | Commit | Verdict | Renew | Renewed | Release | Await | Granted | Renounce
    | Account | Saved | Stale | Refused | Bye
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """Raises RemoteProtocolError on anything but one whole message within bounds."""
    if len(frame) > MAX_FRAME:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes, the limit is {MAX_FRAME}")
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise RemoteProtocolError(f"not a message of protocol version {VERSION}: {error}") from None
