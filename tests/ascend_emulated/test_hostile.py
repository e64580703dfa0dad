"""What an owner that is asked (csrc/service.h) hears from strangers, and a reader from an owner that lies."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pd_connector.memory import native
from pd_connector.testing.arena import GEOMETRIES, Arena
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, LEASE, PEER, SEED, Pair
from pd_connector.transport.base import Completion, Status
from pd_connector.transport.hixl import HixlTransport

from .device import ADOPTED
from .libraries import Board

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

HELLO, MEMORY, BEGIN, READ, GO = 1, 2, 3, 4, 5
DONE, NOT_GRANTED, STALE = 0, 2, 100
WHERE = struct.Struct("<8s16sHH16s")
ASK = struct.Struct("<QQQII64s")
PIECE = struct.Struct("<QQQII")
STRANGERS = 64
"""SERVICE_STRANGERS of csrc/service.h."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    Board()
    owner = LocalOwner(HixlTransport("owner", {}), "mixed", SEED, ADOPTED)
    reader = HixlTransport("reader", {})
    yield Pair(reader, owner, "mixed", ADOPTED)
    reader.close()
    owner.close()


def dial(pair: Pair) -> socket.socket:
    *_, port, _ = WHERE.unpack_from(pair.owner.describe())
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    return made


def message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<II", kind, len(body)) + body


def hello(pair: Pair) -> bytes:
    magic, instance, *_ = WHERE.unpack_from(pair.owner.describe())
    return message(HELLO, magic + instance)


def take(connection: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count:
        more = connection.recv(count - len(out))
        assert more, "hung up"
        out += more
    return out


def answer(connection: socket.socket) -> tuple[int, bytes]:
    status, count = struct.unpack("<II", take(connection, 8))
    return status, take(connection, count)


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def greeted(pair: Pair) -> tuple[socket.socket, int]:
    """A connection, and the generation of the owner's memory."""
    connection = dial(pair)
    connection.sendall(hello(pair))
    assert answer(connection)[0] == DONE
    connection.sendall(message(MEMORY))
    status, body = answer(connection)
    assert status == DONE
    return connection, struct.unpack_from("<Q", body)[0]


def ask(generation: int, *pieces: bytes, count: int | None = None, capability: bytes = CAPABILITY) -> bytes:
    named = len(pieces) if count is None else count
    head = ASK.pack(generation, LEASE.number, LEASE.epoch, named, len(capability), capability)
    return message(READ, head + b"".join(pieces))


@pytest.mark.parametrize(
    "first",
    [
        b"\0" * 64,
        b"\xff" * 64,
        message(HELLO),
        message(HELLO, b"x" * 24),
        message(MEMORY),
        message(READ, b"\0" * 200),
        struct.pack("<II", HELLO, 2**32 - 1) + b"x" * 100,
    ],
)
def test_who_does_not_greet_is_hung_up_on(pair: Pair, first: bytes) -> None:
    with dial(pair) as connection:
        connection.sendall(first)
        assert hung_up(connection)
    pair.settle()


@pytest.mark.parametrize(
    "more",
    [
        message(77),
        message(MEMORY, b"x"),
        message(BEGIN),
        message(GO),
        message(READ),
        message(READ, b"\0" * ASK.size),
        ask(1, count=0),
        ask(1, count=1025),
        ask(1, PIECE.pack(0, 0, 0, 0, 1)),
        ask(1, PIECE.pack(0, 0, 8, 0, 0)),
        ask(1, PIECE.pack(0, 0, 2**63, 0, 2**32 - 1)),
        ask(1, *[PIECE.pack(0, 0, 4096, 0, 48)] * 1024),
        ask(1, PIECE.pack(0, 0, 8, 0, 1), count=2),
    ],
)
def test_a_message_that_cannot_be_ends_its_connection_alone(pair: Pair, more: bytes) -> None:
    connection, _ = greeted(pair)
    with connection:
        connection.sendall(more)
        assert hung_up(connection)
    pair.settle()


@pytest.mark.parametrize(
    ("piece", "status"),
    [
        (PIECE.pack(99, 0, 8, 0, 1), 4),
        (PIECE.pack(2**64 - 1, 0, 8, 0, 1), 4),
        (PIECE.pack(0, 4095, 8, 0, 1), 4),
        (PIECE.pack(0, 2**64 - 4, 8, 0, 1), 4),
        (PIECE.pack(0, 0, 8, 47, 2), 4),
        (PIECE.pack(0, 0, 8, 2**32 - 1, 2), 4),
        (PIECE.pack(0, 0, 4096, 0, 48), DONE),
    ],
)
def test_a_question_is_judged(pair: Pair, piece: bytes, status: int) -> None:
    connection, generation = greeted(pair)
    with connection:
        connection.sendall(ask(generation, piece))
        assert answer(connection)[0] == status
        connection.sendall(ask(generation, piece, capability=b"wrong" * 3 + b"!"))
        assert answer(connection)[0] == (4 if status == 4 else NOT_GRANTED)
        connection.sendall(ask(generation + 1, piece))
        assert answer(connection)[0] == STALE


def test_random_bytes(pair: Pair) -> None:
    rng = random.Random(SEED)
    for _ in range(60):
        connection, generation = greeted(pair)
        with connection:
            good = bytearray(ask(generation, PIECE.pack(0, 0, 64, 3, 1)))
            for _ in range(rng.randint(1, 6)):
                good[rng.randrange(len(good))] = rng.randrange(256)
            connection.sendall(good[: rng.randint(1, len(good))])
    pair.settle()


def test_connections_without_number(pair: Pair) -> None:
    """Of the silent ones all but the latest 64 are shown out, and those who stay keep nobody out."""
    silent = [dial(pair) for _ in range(560)]
    refused = 0
    end = time.monotonic() + 8  # before anybody goes for being silent
    with selectors.DefaultSelector() as waiting:
        for each in silent:
            waiting.register(each, selectors.EVENT_READ)
        while refused < 560 - STRANGERS and time.monotonic() < end:
            for key, _ in waiting.select(0.5):
                refused += hung_up(waiting.unregister(key.fileobj).fileobj)  # type: ignore[arg-type]
    assert refused == 560 - STRANGERS
    end = time.monotonic() + 20
    while True:
        pair.reader.connect(PEER, pair.owner.describe(), tag := pair.tag())
        if pair.wait(tag).status is Status.DONE:
            break
        assert time.monotonic() < end
    pair.settle()
    for each in silent:
        each.close()


@contextmanager
def liar(*answers: bytes) -> Iterator[bytes]:
    """The description of an owner that answers so, question by question."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    for each in answers:
                        connection.recv(65536)
                        connection.sendall(each)
                    connection.recv(65536)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    address = socket.inet_aton("127.0.0.1").ljust(16, b"\0")
    where = WHERE.pack(b"PDHIXL1\0", b"i" * 16, 4, listener.getsockname()[1], address)
    try:
        yield where + b"127.0.0.1:9".ljust(64, b"\0")
    finally:
        listener.close()


WELCOME = message(DONE, b"i" * 16)


@pytest.mark.parametrize(
    "answers",
    [
        (b"\xff" * 40,),
        (message(DONE),),
        (message(DONE, b"j" * 16),),
        (struct.pack("<II", DONE, 2**31),),
        (message(4, b"no"),),
        (message(4, b"x" * 5000),),
        (WELCOME, b"\xff" * 40),
        (WELCOME, message(DONE)),
        (WELCOME, struct.pack("<II", DONE, 2**32 - 1)),
        (WELCOME, message(DONE, struct.pack("<QII", 1, 2**32 - 1, 2**32 - 1))),
        (WELCOME, message(DONE, struct.pack("<QII", 1, 1, 0) + struct.pack("<QQ", 2**64 - 1, 2**64 - 1) + b"\0" * 72)),
    ],
)
def test_an_owner_that_lies(answers: tuple[bytes, ...]) -> None:
    Board()
    reader = HixlTransport("reader", {"link_ms": 300})
    try:
        reader.register(Arena(GEOMETRIES["mixed"], 1, ADOPTED).regions)
        with liar(*answers) as where:
            reader.connect(PEER, where, 1)
            end = time.monotonic() + 20
            ended: list[Completion] = []
            while not ended and time.monotonic() < end:
                ended = reader.poll(1)
                time.sleep(0.005)
        assert ended
        assert ended[0].status is Status.PEER_LOST
        assert len(ended[0].detail) > 10
    finally:
        reader.close()
