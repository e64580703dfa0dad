"""A reader's connection to an owner's ROUTER, whose frames of block memory the kernel puts where they belong.

Nothing here blocks. A link is thrown away, never revived: answers of an old one cannot reach a new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.transport import zmtp

SMALL_BYTES = 4096
"""Asked for at once where headers are due. What of a body comes along is copied."""
RECEIVE_BYTES = 256 << 10
"""Of a body, asked for at once and waited for: fewer system calls, and what came last is still in the caches."""
TURN_BYTES = 4 << 20
"""Received before others have their turn."""
SMALL_COST = 256 << 10
"""What asking for a few bytes counts in a turn: they may hold two thousand frames."""
MAX_HEAD_BYTES = 1024
MAX_FRAMES = 8192
"""Of one message; owners send one for 32 KiB on average."""
MAX_PONGS_BYTES = 64 << 10
"""Unsent, beyond which the pings of a peer that takes nothing are not answered."""
_VIEWS = 64

Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class LinkLost(ConnectionError):
    """The connection is over, or never came to be."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first frame of a message. Where ``more`` of it goes, ``Link.expect`` says; otherwise it is dropped."""

    frame: bytes
    more: bool


@dataclass(frozen=True, slots=True)
class End:
    """All that was behind the last head has come."""


def resolve(endpoint: str, *, look_up: bool) -> Address | None:
    """Where ``tcp://host:port`` is; None for a name that is not to be looked up, which may take as long as the name
    server likes. Raises OSError or ValueError."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not 0 < int(port) < 65536:
        raise ValueError(f"there is no port {port}")
    flags = 0 if look_up else socket.AI_NUMERICHOST
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        if look_up or error.errno != socket.EAI_NONAME:
            raise
        return None
    return found[0][0], found[0][4]


class Link:
    def __init__(self, address: Address, max_frame: int) -> None:
        """Raises OSError."""
        self.made = self.heard = time.monotonic()
        self._max_frame = max_frame
        self._out = bytearray(zmtp.GREETING)
        self._unsent: list[bytes] | None = []  # until the handshake is over
        self._greeted = self._connected = False
        self._in = bytearray()
        self._left = 0  # bytes of the current frame, one behind a head
        self._more = self._in_body = False
        self._frames = 0  # of the current message so far
        self._targets: deque[memoryview] | None = None
        self._room = 0  # bytes in them
        self._waste = memoryview(b"")
        self._low = 1
        self._socket = socket.socket(address[0], socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        status = self._socket.connect_ex(address[1])
        if status not in (0, errno.EINPROGRESS):
            self._socket.close()
            raise OSError(status, os.strerror(status))

    def fileno(self) -> int:
        """-1 once it is closed."""
        return self._socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out) or not self._connected

    @property
    def in_handshake(self) -> bool:
        return self._unsent is not None

    def send(self, frames: list[bytes]) -> None:
        """Raises LinkLost."""
        message = zmtp.encode_message(frames)
        if self._unsent is None:
            self._write(message)
        else:
            self._unsent.append(message)

    def ping(self) -> None:
        """Whoever is there answers. Raises LinkLost."""
        if self._unsent is None:
            self._write(zmtp.ping())

    def expect(self, targets: Iterable[memoryview]) -> None:
        """Where the rest of the message goes, which must fill them exactly."""
        self._targets = deque(target for target in targets if len(target))
        self._room = sum(map(len, self._targets))

    def drop(self) -> None:
        """Nothing more of this message is written anywhere."""
        self._targets = None

    def events(self) -> Iterator[Head | End]:
        """What has come, and what can be sent is. Ends when nothing more is there or others should have their turn.

        Raises LinkLost; RemoteProtocolError for what is not ZMTP, and for a message that does not fit ``expect``.
        """
        if not self._connected and not self._is_connected():
            return
        self._write(b"")
        budget = TURN_BYTES
        while self.fileno() >= 0:  # the caller may close it meanwhile
            event = self._parse()
            if event is not None:
                yield event
                continue
            small = not self._left
            if budget <= 0 or not (got := self._receive()):
                self._wait_for(min(self._left, RECEIVE_BYTES))
                return
            budget -= SMALL_COST if small else got

    def close(self) -> None:
        self._targets = None
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a forked child may hold it open
        self._socket.close()

    def _is_connected(self) -> bool:
        status = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            raise LinkLost(os.strerror(status))
        try:
            self._socket.getpeername()
        except OSError:
            return False
        self._connected = True
        return True

    def _write(self, data: bytes) -> None:
        self._out += data
        try:
            while self._out and self._connected:
                del self._out[: self._socket.send(self._out, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise LinkLost(str(error)) from None

    def _receive(self) -> int:
        """Bytes that came, 0 if none. Raises LinkLost."""
        try:
            if not self._left:
                data = self._socket.recv(SMALL_BYTES)
                self._in += data
                got = len(data)
            else:
                got = self._socket.recvmsg_into(self._views())[0]
                self._filled(got)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkLost(str(error)) from None
        if not got:
            raise LinkLost("connection closed by the peer")
        self.heard = time.monotonic()
        return got

    def _wait_for(self, size: int) -> None:
        """Be woken when that many bytes are there, not for every segment. They surely come."""
        low = max(1, size)
        if low != self._low:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low = low

    def _parse(self) -> Head | End | None:
        """The next event that the buffer holds, which is then smaller."""
        if not self._greeted:
            if not zmtp.check_greeting(self._in[: len(zmtp.GREETING)]):
                return None
            del self._in[: len(zmtp.GREETING)]
            self._greeted = True
            self._write(zmtp.ready(b"DEALER"))
        while True:
            if self._left:
                self._copy()
                if self._left:
                    return None
            if self._in_body and not self._more:
                return self._end()
            header = zmtp.decode_header(self._in)
            if header is None:
                return None
            in_body = self._in_body and not header.command
            if header.size > (self._max_frame if in_body else MAX_HEAD_BYTES):
                raise RemoteProtocolError(f"a frame of {header.size} bytes")
            if in_body:
                del self._in[: header.length]
                self._begin_frame(header)
                continue
            if len(self._in) < header.length + header.size:
                return None
            frame = bytes(self._in[header.length : header.length + header.size])
            del self._in[: header.length + header.size]
            if header.command:
                self._on_command(frame)
            elif self._unsent is not None:
                raise RemoteProtocolError("a message before the handshake was over")
            else:
                self._in_body, self._more, self._frames = True, header.more, 0
                self._targets = None
                return Head(frame, header.more)

    def _end(self) -> End:
        self._in_body = False
        if self._targets:
            raise RemoteProtocolError(f"a slice came {self._room} bytes short")
        return End()

    def _on_command(self, command: bytes) -> None:
        if self._unsent is not None:
            zmtp.check_ready(command, b"ROUTER")
            unsent, self._unsent = self._unsent, None
            self._write(b"".join(unsent))
            return
        name, body = zmtp.split_command(command)
        if name == b"PING":
            if len(self._out) < MAX_PONGS_BYTES:
                self._write(zmtp.pong(body))
        elif name != b"PONG":
            raise RemoteProtocolError(f"an unexpected command {name!r}")

    def _begin_frame(self, header: zmtp.Header) -> None:
        self._left, self._more = header.size, header.more
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise RemoteProtocolError(f"a message of more than {MAX_FRAMES} frames")
        if self._targets is not None and self._left > self._room:
            raise RemoteProtocolError(f"a slice came with at least {self._left - self._room} bytes too many")

    def _copy(self) -> None:
        """What of the current frame came along with its header."""
        while self._left and self._in:
            view = self._views()[0]
            size = min(len(view), len(self._in))
            view[:size] = self._in[:size]
            del self._in[:size]
            self._filled(size)

    def _views(self) -> list[memoryview]:
        """Where the next bytes of the current frame go."""
        room = min(self._left, RECEIVE_BYTES)
        if self._targets is None:
            if not self._waste:
                self._waste = memoryview(bytearray(RECEIVE_BYTES))
            return [self._waste[:room]]
        views = []
        for target in self._targets:
            views.append(target[:room])
            room -= len(views[-1])
            if not room or len(views) == _VIEWS:
                break
        return views

    def _filled(self, size: int) -> None:
        self._left -= size
        if self._targets is None:
            return
        self._room -= size
        while size:
            target = self._targets.popleft()
            if len(target) > size:
                self._targets.appendleft(target[size:])
                return
            size -= len(target)
