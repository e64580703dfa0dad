"""Messages of the zmq transport: one MessagePack array each, bulk as frames after it.

    reader → owner   Ping
                     Read, block ids (<u4)
    owner → reader   Pong
                     Answer, then frames of block memory when its status is OK

Every slice is one request and one answer, matched by ``serial``, which never repeats on a connection.
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
from pd_connector.transport.grants import MAX_CAPABILITY_BYTES
from pd_connector.transport.slices import SLICE_BYTES, SLICE_CHUNKS, SLICE_PARTS, Blocks, Part

VERSION = 2
MAX_REQUEST_FRAME = max(SLICE_CHUNKS * 4, SLICE_PARTS * 32) + 1024
MAX_ANSWER_FRAME = SLICE_BYTES + 1024
MAX_DETAIL = 256

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, Meta(ge=1, le=SLICE_BYTES)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Code(IntEnum):
    OK = 0
    NOT_GRANTED = 1
    REFUSED = 2


class Where(msgspec.Struct, frozen=True, array_like=True):
    """What ``describe`` says. ``instance`` tells an owner from whoever binds its port next."""

    version: int
    endpoint: Annotated[str, Meta(max_length=512)]
    instance: Nonce


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=1):
    nonce: Nonce


class Read(msgspec.Struct, frozen=True, array_like=True, tag=2):
    serial: Count
    lease: Count
    epoch: Count
    capability: Annotated[bytes, Meta(max_length=MAX_CAPABILITY_BYTES)]
    parts: Annotated[tuple[tuple[Count, Count, Size], ...], Meta(min_length=1, max_length=SLICE_PARTS)]


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=3):
    nonce: Nonce
    instance: Nonce


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=4):
    serial: Count
    code: Code
    detail: Annotated[str, Meta(max_length=MAX_DETAIL)] = ""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    serial: int
    lease: LeaseId
    capability: bytes
    blocks: Blocks
    parts: tuple[Part, ...]


_encoder = msgspec.msgpack.Encoder()
_to_owner: msgspec.msgpack.Decoder[Ping | Read] = msgspec.msgpack.Decoder(Ping | Read)
_to_reader: msgspec.msgpack.Decoder[Pong | Answer] = msgspec.msgpack.Decoder(Pong | Answer)


def encode(message: Ping | Read | Pong | Answer) -> bytes:
    return _encoder.encode(message)


def encode_request(request: Request) -> list[bytes]:
    head = Read(request.serial, request.lease.number, request.lease.epoch, request.capability, request.parts)
    return [_encoder.encode(head), request.blocks.astype("<u4", copy=False).tobytes()]


def decode_request(frames: Sequence[bytes]) -> Ping | Request:
    """Bounds first, then expansion. Raises RemoteProtocolError; addresses are left to HostMemory to check."""
    if len(frames) not in (1, 2):
        raise RemoteProtocolError(f"a request of {len(frames)} frames")
    try:
        head = _to_owner.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a request: {error}") from error
    if isinstance(head, Ping):
        return head
    if len(frames) != 2 or not frames[1] or len(frames[1]) % 4:
        raise RemoteProtocolError("a read request without whole block ids")
    blocks = len(frames[1]) // 4
    if blocks * len(head.parts) > SLICE_CHUNKS or blocks * sum(size for _, _, size in head.parts) > SLICE_BYTES:
        raise RemoteProtocolError(f"a read request beyond {SLICE_BYTES} bytes or {SLICE_CHUNKS} chunks")
    ids = np.frombuffer(frames[1], "<u4").astype(np.uint32, copy=False)
    return Request(head.serial, LeaseId(head.lease, head.epoch), head.capability, ids, head.parts)


def decode_answer(frame: bytes | memoryview) -> Pong | Answer:
    """Raises RemoteProtocolError."""
    try:
        return _to_reader.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not an answer: {error}") from error


def decode_where(remote: bytes) -> Where:
    """Raises RemoteProtocolError that says why the description cannot be used."""
    try:
        where = msgspec.msgpack.decode(remote, type=Where)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the peer's description is not one of zmq: {error}") from error
    if where.version != VERSION:
        raise RemoteProtocolError(f"the peer speaks version {where.version} of the zmq transport, we speak {VERSION}")
    if not where.endpoint.startswith("tcp://"):
        raise RemoteProtocolError(f"the peer's endpoint {where.endpoint!r} is not tcp://host:port")
    return where
