"""The zmq transport's reader against an owner that says exactly what a test has it say, byte by byte.

The reader's bytes go from the socket into block memory, so what matters is what may still be written, and where.
"""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from pd_connector.plan import CopyPlan
from pd_connector.testing.arena import POISON
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, DEADLINE_S, LEASE, PEER, SEED, Pair
from pd_connector.transport import zmq_link, zmq_reader, zmtp
from pd_connector.transport.base import Status
from pd_connector.transport.zmq import ZmqTransport
from pd_connector.transport.zmq_wire import VERSION, Answer, Code, Ping, Pong, Read, Where, encode

INSTANCE = b"i" * 16


class RawOwner:
    """One TCP connection, served from the test's own thread."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(DEADLINE_S)
        self.rest = b""

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(Where(VERSION, f"tcp://127.0.0.1:{self.listener.getsockname()[1]}", INSTANCE))

    def grant(self, *_: object) -> None:
        pass

    def revoke(self, *_: object) -> None:
        pass

    def signal(self, number: int) -> None:
        raise NotImplementedError

    def accept(self) -> None:
        """The handshake, and the first ping."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(DEADLINE_S)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self.send(zmtp.GREETING)
        zmtp.check_greeting(self.take(len(zmtp.GREETING)))
        self.send(zmtp.ready(b"ROUTER"))
        zmtp.check_ready(self.frame(), b"DEALER")
        ping = msgspec.msgpack.decode(self.frame(), type=Ping)
        self.say(encode(Pong(ping.nonce, INSTANCE)))

    def take(self, size: int) -> bytes:
        while len(self.rest) < size:
            data = self.connection.recv(65536)
            assert data, "the reader hung up"
            self.rest += data
        out, self.rest = self.rest[:size], self.rest[size:]
        return out

    def frame(self) -> bytes:
        head = self.take(2)
        while (header := zmtp.decode_header(head)) is None:
            head += self.take(1)
        return self.take(header.size)

    def request(self) -> Read:
        read = msgspec.msgpack.decode(self.frame(), type=Read)
        self.frame()  # the blocks
        return read

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def say(self, *frames: bytes) -> None:
        self.send(zmtp.encode_message(frames))

    def hung_up(self) -> bool:
        while True:
            try:
                if not self.connection.recv(65536):
                    return True
            except ConnectionError:
                return True

    def close(self) -> None:
        self.listener.close()
        if hasattr(self, "connection"):
            self.connection.close()


def answer(read: Read, value: bytes = b"g") -> bytes:
    """A whole answer, in one frame."""
    size = sum(size for _, _, size in read.parts)
    return zmtp.encode_message([encode(Answer(read.serial, Code.OK)), value * size])


@pytest.fixture
def both() -> Iterator[tuple[Pair, RawOwner]]:
    owner, reader = RawOwner(), ZmqTransport("reader", {})
    pair = Pair(reader, owner, "big", connected=False)
    connect = pair.connect()
    owner.accept()
    assert pair.wait(connect).status is Status.DONE
    yield pair, owner
    reader.close()
    owner.close()


def one_block(pair: Pair, block: int) -> CopyPlan:
    return pair.blocks([block])


def end(pair: Pair, tag: int, how: str) -> Status:
    if how == "fence":
        pair.wait(pair.fence())
    elif how == "cancel":
        pair.reader.cancel(tag)
    else:
        pair.reader.disconnect(PEER)
    return pair.wait(tag).status


@pytest.mark.parametrize("how", ["cancel", "fence", "disconnect"])
def test_a_read_that_ends_within_a_slice_is_written_no_more(both: tuple[Pair, RawOwner], how: str) -> None:
    pair, owner = both
    pair.target.poison()
    tag = pair.read(one_block(pair, 0))
    whole = answer(owner.request())
    owner.send(whole[: len(whole) // 2])
    pair.catch()
    assert end(pair, tag, how) is Status.CANCELLED
    before = [array.copy() for array in pair.target.arrays]
    assert any((array == POISON).any() for array in before), "all of it had come: nothing is tried"
    if how == "cancel":
        owner.send(whole[len(whole) // 2 :])
        other = pair.read(one_block(pair, 1))  # the stream is where it should be
        owner.send(answer(owner.request(), b"h"))
        assert pair.wait(other).status is Status.DONE
        pair.target.chunk(pair.target.arrays, 0, 1, 0, 1 << 20)[:] = POISON
    else:
        with contextlib.suppress(ConnectionError):
            owner.send(whole[len(whole) // 2 :])
        assert owner.hung_up()
        time.sleep(0.1)
    assert pair.target.same(before)


def test_bytes_may_come_one_at_a_time() -> None:
    owner, reader = RawOwner(), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "mixed", connected=False)
        tag = pair.connect()
        owner.accept()
        pair.wait(tag)
        rng = random.Random(SEED)
        tag = pair.read(CopyPlan(one_block(pair, 3).runs, one_block(pair, 3).patterns[:1]))
        data = answer(owner.request(), b"z")
        while data:
            size = rng.randint(1, 40)
            owner.send(data[:size])
            data = data[size:]
        assert pair.wait(tag).status is Status.DONE
        assert set(pair.target.chunk(pair.target.arrays, 0, 3, 0, 4096).tolist()) == {ord("z")}
    finally:
        reader.close()
        owner.close()


def nothing_good(rng: random.Random, good: bytes) -> bytes:
    """What a broken or hostile owner might send instead of an answer."""
    data = bytearray(good)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randint(1, 300))
    if kind == 1:  # the first frames lie about anything
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(48)] = rng.randrange(256)
        return bytes(data)
    if kind == 2:  # frames of any length that the header can say
        return bytes([rng.choice([2, 3, 6])]) + rng.randbytes(8) + bytes(data)
    if kind == 3:
        return b"\x01\x00" * rng.randint(1, 9000) + bytes(data)
    at = rng.randrange(len(data))
    if kind == 4:
        return bytes(data[:at])
    return bytes(data[:at]) + rng.randbytes(9) + bytes(data[at:])


def test_whatever_an_owner_sends_stays_inside_the_plan() -> None:
    """300 connections, each ended by something that is no answer; a healthy peer is read in between."""
    rng, reader = random.Random(SEED), ZmqTransport("reader", {})
    owner, healthy = RawOwner(), LocalOwner(ZmqTransport("owner", {}), "mixed", SEED)
    try:
        good = Pair(reader, healthy, "mixed")
        pair = Pair(reader, owner, "mixed", good.target, connected=False)
        pair._next_tag = 1_000_000
        outcomes = set()
        for _ in range(300):
            tag = pair.tag()
            reader.connect("hostile", owner.describe(), tag)
            owner.accept()
            pair.wait(tag)
            pair.target.poison()
            plan, tag = one_block(pair, 5), pair.tag()
            outside = pair.target.expect(plan, pair.target, pair.target.arrays)
            reader.post_read("hostile", LEASE, CAPABILITY, plan, tag)
            with contextlib.suppress(OSError):  # it may hang up before all is said
                owner.send(nothing_good(rng, answer(owner.request())))
                owner.connection.shutdown(socket.SHUT_WR)
            outcomes.add(pair.wait(tag).status)
            for pattern in plan.patterns:
                pair.target.chunk(pair.target.arrays, pattern.dst_grid, 5, 0, pattern.run_bytes)[:] = POISON
            assert pair.target.same(outside)
            owner.connection.close()
        assert {Status.ERROR, Status.PEER_LOST} <= outcomes
        good.settle()
    finally:
        reader.close()
        owner.close()
        healthy.close()


def test_an_endless_message_takes_no_memory_and_keeps_nobody_waiting(both: tuple[Pair, RawOwner]) -> None:
    """Frames without end behind a read that was cancelled: dropped, while another peer is read."""
    pair, owner = both
    tag = pair.read(one_block(pair, 0))
    read = owner.request()
    pair.reader.cancel(tag)
    assert pair.wait(tag).status is Status.CANCELLED
    healthy = LocalOwner(ZmqTransport("owner", {}), "mixed", SEED)
    reader = pair.reader
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        head = encode(Answer(read.serial, Code.OK))
        owner.send(bytes([1, len(head)]) + head)
        piece = b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)
        for _ in range(300):
            owner.send(piece)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "more than 64 MiB (in KiB)"
        tag = pair.tag()
        reader.connect("healthy", healthy.describe(), tag)
        for _ in range(20):
            owner.send(piece)
        assert pair.wait(tag).status is Status.DONE
    finally:
        healthy.close()


def test_a_listener_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_reader, "SILENCE_S", 0.6)
    reader, listener = ZmqTransport("reader", {}), socket.create_server(("127.0.0.1", 0))
    try:
        where = Where(VERSION, f"tcp://127.0.0.1:{listener.getsockname()[1]}", INSTANCE)
        reader.connect("mute", msgspec.msgpack.encode(where), 1)
        end, found = time.monotonic() + DEADLINE_S, []
        while not found and time.monotonic() < end:
            found = reader.poll(4)
            time.sleep(0.01)
        assert [(each.tag, each.status) for each in found] == [(1, Status.PEER_LOST)]
        assert "cannot be reached: nothing came for" in found[0].detail
    finally:
        reader.close()
        listener.close()


def test_the_heartbeat_of_an_owner_is_answered() -> None:
    """And ours by it, or an idle reader would be given up by either."""
    reader, context = ZmqTransport("reader", {}), zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.HEARTBEAT_IVL, 50)
            router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 400)
            monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            where = Where(VERSION, f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}", INSTANCE)
            reader.connect("peer", msgspec.msgpack.encode(where), 1)
            name, ping = router.recv_multipart()
            router.send_multipart([name, encode(Pong(msgspec.msgpack.decode(ping, type=Ping).nonce, INSTANCE))])
            assert not monitor.poll(1500), "the owner gave the reader up"
            router.disable_monitor()
            monitor.close()
    finally:
        reader.close()
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:99999", "tcp://127.0.0.1:", "tcp://[::1:5", "tcp://" + "x" * 300 + ":5", "tcp://:-1"]
)
def test_an_address_that_is_none_is_said(endpoint: str) -> None:
    reader = ZmqTransport("reader", {})
    try:
        reader.connect("peer", msgspec.msgpack.encode(Where(VERSION, endpoint, INSTANCE)), 1)
        end, found = time.monotonic() + DEADLINE_S, []
        while not found and time.monotonic() < end:
            found = reader.poll(4)
            time.sleep(0.01)
        assert [(each.tag, each.status) for each in found] == [(1, Status.PEER_LOST)]
        assert endpoint in found[0].detail
    finally:
        reader.close()


def test_what_is_asked_for_at_once_fits_the_buffers() -> None:
    assert zmq_link.SMALL_BYTES <= zmq_link.RECEIVE_BYTES <= zmq_link.TURN_BYTES
