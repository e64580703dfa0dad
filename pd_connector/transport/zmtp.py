"""The connecting side of a ZMTP 3 connection (rfc.zeromq.org/spec/23 and 37), without I/O.

The zmq transport's reader speaks it by itself, because libzmq hands over frames in memory of its own: bytes that come
through it are copied once more than bytes that a socket puts where they belong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pd_connector.errors import RemoteProtocolError

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.1, mechanism, not as server, filler."""
HEADER_BYTES = 9
"""Of the longest header of a frame."""

_MORE, _LONG, _COMMAND = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Header:
    """Of a frame: ``size`` bytes follow its own ``length``; ``more``: then another frame of the same message."""

    length: int
    size: int
    more: bool
    command: bool


def check_greeting(greeting: bytes | bytearray) -> bool:
    """Whether it is whole. Raises RemoteProtocolError as soon as it cannot be one of ZMTP 3 without encryption."""
    if greeting[:1] not in (b"", GREETING[:1]) or greeting[9:10] not in (b"", GREETING[9:10]):
        raise RemoteProtocolError("whoever listens there does not speak ZeroMQ")
    if len(greeting) < len(GREETING):
        return False
    if greeting[10] < 3:
        raise RemoteProtocolError(f"the peer speaks ZMTP {greeting[10]}, which is older than 3")
    mechanism = bytes(greeting[12:32]).rstrip(b"\0")
    if mechanism != b"NULL":
        raise RemoteProtocolError(f"the peer's port asks for the mechanism {mechanism!r}, not NULL")
    return True


def ready(socket_type: bytes) -> bytes:
    """The command that ends our half of the handshake."""
    body = b"".join(_property(name, value) for name, value in ((b"Socket-Type", socket_type), (b"Identity", b"")))
    return _command(b"READY", body)


def check_ready(command: bytes, socket_type: bytes) -> None:
    """Raises RemoteProtocolError unless it is the READY of a socket of that type."""
    name, body = split_command(command)
    if name == b"ERROR":
        raise RemoteProtocolError(f"the peer refused the connection: {body[1:]!r}")
    if name != b"READY" or _property(b"Socket-Type", socket_type).lower() not in body.lower():
        raise RemoteProtocolError(f"the peer's handshake is not that of a {socket_type.decode()}")


def split_command(command: bytes) -> tuple[bytes, bytes]:
    """Name and body. Raises RemoteProtocolError."""
    if not command or len(command) <= command[0]:
        raise RemoteProtocolError("a command without a name")
    return command[1 : 1 + command[0]], command[1 + command[0] :]


def ping() -> bytes:
    return _command(b"PING", bytes(2))  # a time to live of 0: none


def pong(body: bytes) -> bytes:
    """The answer to a PING of this body: its context behind two bytes of time to live."""
    return _command(b"PONG", body[2:18])


def encode_message(frames: Sequence[bytes]) -> bytes:
    *first, last = frames
    return b"".join([*(_frame(frame, _MORE) for frame in first), _frame(last, 0)])


def decode_header(data: bytes | bytearray) -> Header | None:
    """What the first bytes of a frame say; None when there are too few. Raises RemoteProtocolError."""
    if not data:
        return None
    flags = data[0]
    if flags & ~(_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
        raise RemoteProtocolError(f"a frame with the flags {flags:#x}")
    length = HEADER_BYTES if flags & _LONG else 2
    if len(data) < length:
        return None
    size = struct.unpack_from(">Q", data, 1)[0] if flags & _LONG else data[1]
    return Header(length, size, bool(flags & _MORE), bool(flags & _COMMAND))


def _frame(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return struct.pack(">BQ", flags | _LONG, len(body)) + body


def _command(name: bytes, body: bytes) -> bytes:
    return _frame(bytes((len(name),)) + name + body, _COMMAND)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">I", len(value)) + value
