"""Messages between the ends of a staged transport: one MessagePack array each. The bytes themselves go over ``inner``.

    reader → owner   Ping
                     Fill, block ids (<u4)
                     Return
    owner → reader   Pong
                     Filled | Refused    the one answer to a Fill
                     Held | Void         the one answer to a Return

Every slice is one Fill and, once it was filled, one Return, matched by the ``serial`` of the Fill. It never repeats on
a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pd_connector.errors import RemoteProtocolError
from pd_connector.transport.base import LeaseId
from pd_connector.transport.grants import MAX_CAPABILITY_BYTES, MIN_CAPABILITY_BYTES
from pd_connector.transport.slices import SLICE_CHUNKS, SLICE_PARTS, Blocks, Part

VERSION = 1
MAX_SLOT_BYTES = 64 << 20
MAX_SLOTS = 256
MAX_REQUEST_FRAME = max(SLICE_CHUNKS * 4, SLICE_PARTS * 32) + 1024
MAX_ANSWER_FRAME = 1024
MAX_DETAIL = 256
MAX_DESCRIPTION = 1024

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, Meta(ge=1, le=MAX_SLOT_BYTES)]
Slot = Annotated[int, Meta(ge=0, lt=MAX_SLOTS)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Detail = Annotated[str, Meta(max_length=MAX_DETAIL)]


class Code(IntEnum):
    NOT_GRANTED = 1  # the block lease is not held (or no longer)
    REFUSED = 2  # an address that does not exist
    BUSY = 3  # too many wait for a slot, or this one did for too long
    FAILED = 4  # the owner's device
    LATE = 5  # the slot was not given back in time: what was read of it may be anything


class Where(msgspec.Struct, frozen=True, array_like=True):
    """What ``describe`` says. ``instance`` tells an owner from whoever binds its port next; ``inner`` is the
    description of the transport that its slots are read over."""

    version: int
    endpoint: Annotated[str, Meta(max_length=512)]
    instance: Nonce
    slot_bytes: Size
    inner: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=1):
    nonce: Nonce


class Fill(msgspec.Struct, frozen=True, array_like=True, tag=2):
    serial: Count
    lease: Count
    epoch: Count
    capability: Annotated[bytes, Meta(max_length=MAX_CAPABILITY_BYTES)]
    parts: Annotated[tuple[tuple[Count, Count, Size], ...], Meta(min_length=1, max_length=SLICE_PARTS)]


class Return(msgspec.Struct, frozen=True, array_like=True, tag=3):
    serial: Count
    slot: Slot
    epoch: Count


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=4):
    nonce: Nonce
    instance: Nonce


class Filled(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The slot is block ``slot`` of the one grid of the inner transport, leased there as (``slot``, ``epoch``)."""

    serial: Count
    slot: Slot
    epoch: Count
    capability: Annotated[bytes, Meta(min_length=MIN_CAPABILITY_BYTES, max_length=MAX_CAPABILITY_BYTES)]
    num_bytes: Size


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=6):
    serial: Count
    code: Code
    detail: Detail = ""


class Held(msgspec.Struct, frozen=True, array_like=True, tag=7):
    serial: Count


class Void(msgspec.Struct, frozen=True, array_like=True, tag=8):
    serial: Count
    code: Code
    detail: Detail = ""


ToReader = Pong | Filled | Refused | Held | Void


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A Fill with its block ids."""

    serial: int
    lease: LeaseId
    capability: bytes
    blocks: Blocks
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.blocks) * sum(size for _, _, size in self.parts)


_encoder = msgspec.msgpack.Encoder()
_to_owner: msgspec.msgpack.Decoder[Ping | Fill | Return] = msgspec.msgpack.Decoder(Ping | Fill | Return)
_to_reader: msgspec.msgpack.Decoder[ToReader] = msgspec.msgpack.Decoder(ToReader)
_WRONG = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(message: Where | Ping | Return | ToReader) -> bytes:
    return _encoder.encode(message)


def encode_fill(request: Request) -> list[bytes]:
    head = Fill(request.serial, request.lease.number, request.lease.epoch, request.capability, request.parts)
    return [_encoder.encode(head), request.blocks.astype("<u4", copy=False).tobytes()]


def decode_request(frames: Sequence[bytes]) -> Ping | Request | Return:
    """Bounds first, then expansion. Raises RemoteProtocolError; addresses and sizes are left to the owner to check."""
    if len(frames) not in (1, 2):
        raise RemoteProtocolError(f"a request of {len(frames)} frames")
    try:
        head = _to_owner.decode(frames[0])
    except _WRONG as error:
        raise RemoteProtocolError(f"not a request: {error}") from error
    if not isinstance(head, Fill):
        return head
    if len(frames) != 2 or not frames[1] or len(frames[1]) % 4:
        raise RemoteProtocolError("a request to fill a slot without whole block ids")
    if len(frames[1]) // 4 * len(head.parts) > SLICE_CHUNKS:
        raise RemoteProtocolError(f"a request to fill a slot beyond {SLICE_CHUNKS} chunks")
    ids = np.frombuffer(frames[1], "<u4").astype(np.uint32, copy=False)
    return Request(head.serial, LeaseId(head.lease, head.epoch), head.capability, ids, head.parts)


def decode_answer(frame: bytes | memoryview) -> ToReader:
    """Raises RemoteProtocolError."""
    try:
        return _to_reader.decode(frame)
    except _WRONG as error:
        raise RemoteProtocolError(f"not an answer: {error}") from error


def decode_where(remote: bytes, name: str) -> Where:
    """Raises RemoteProtocolError that says why the description cannot be used."""
    try:
        where = msgspec.msgpack.decode(remote, type=Where)
    except _WRONG as error:
        raise RemoteProtocolError(f"the peer's description is not one of {name}: {error}") from error
    if where.version != VERSION:
        raise RemoteProtocolError(f"the peer speaks version {where.version} of {name}, we speak {VERSION}")
    if not where.endpoint.startswith("tcp://"):
        raise RemoteProtocolError(f"the peer's endpoint {where.endpoint!r} is not tcp://host:port")
    return where
