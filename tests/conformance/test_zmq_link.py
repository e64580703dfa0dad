"""The zmq transport's reader against an owner that says exactly what a test has it say, byte by byte.

The reader's bytes go from the socket into block memory, so what matters is what may still be written, and where.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from pd_connector.plan import CopyPlan
from pd_connector.testing.arena import POISON
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, DEADLINE_S, LEASE, PEER, SEED, Pair
from pd_connector.transport import zmq_reader, zmtp
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

    def accept(self, *, pong: bool = True) -> None:
        """The handshake, and the first ping."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(DEADLINE_S)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self.send(zmtp.GREETING)
        zmtp.check_greeting(self.take(len(zmtp.GREETING)))
        self.send(zmtp.ready(b"ROUTER"))
        zmtp.check_ready(self.frame(), b"DEALER")
        self.nonce = msgspec.msgpack.decode(self.frame(), type=Ping).nonce
        if pong:
            self.say(encode(Pong(self.nonce, INSTANCE)))

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


def rss_mib() -> int:
    """Now: the most there ever was may be an earlier test's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


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
        before = rss_mib()
        head = encode(Answer(read.serial, Code.OK))
        owner.send(bytes([1, len(head)]) + head)
        piece = b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)
        for _ in range(300):
            owner.send(piece)
        assert rss_mib() - before < 64
        tag = pair.tag()
        reader.connect("healthy", healthy.describe(), tag)
        for _ in range(20):
            owner.send(piece)
        assert pair.wait(tag).status is Status.DONE
    finally:
        healthy.close()


def connected(reader: ZmqTransport, listener: socket.socket, said: Callable[[int], bytes]) -> tuple[Status, str]:
    """How a connect ends whose listener says something every 50 ms."""
    port = listener.getsockname()[1]
    reader.connect("odd", msgspec.msgpack.encode(Where(VERSION, f"tcp://127.0.0.1:{port}", INSTANCE)), 1)
    with listener, listener.accept()[0] as connection:
        for turn in range(int(DEADLINE_S / 0.05)):
            with contextlib.suppress(OSError):
                connection.sendall(said(turn))
            time.sleep(0.05)
            for completion in reader.poll(4):
                assert completion.tag == 1
                return completion.status, completion.detail
    raise AssertionError("it goes on for ever")


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (lambda _: b"", Status.PEER_LOST, "cannot be reached: n"),
        (lambda turn: zmtp.GREETING[turn : turn + 1], Status.PEER_LOST, "no handshake within"),
        (lambda turn: b"" if turn else b"SSH-2.0-OpenSSH", Status.ERROR, "does not speak ZeroMQ"),
    ],
)
def test_a_listener_that_is_none_of_ours_is_given_up(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[int], bytes], status: Status, words: str
) -> None:
    monkeypatch.setattr(zmq_reader, "SILENCE_S", 0.6)
    reader = ZmqTransport("reader", {})
    try:
        found, detail = connected(reader, socket.create_server(("127.0.0.1", 0)), said)
        assert found is status
        assert words in detail
    finally:
        reader.close()


def test_nothing_is_asked_of_whoever_has_not_proven_to_be_the_peer(both: tuple[Pair, RawOwner]) -> None:
    """The connection is another one after a fence, and somebody else may listen there by now."""
    pair, owner = both
    pair.wait(pair.fence())
    tag = pair.read(one_block(pair, 0))
    owner.connection.close()
    owner.accept(pong=False)
    owner.connection.settimeout(0.5)
    with pytest.raises(TimeoutError):
        owner.frame()
    owner.connection.settimeout(DEADLINE_S)
    owner.say(encode(Pong(owner.nonce, INSTANCE)))
    owner.send(answer(owner.request()))
    assert pair.wait(tag).status is Status.DONE


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


FLOODS = {
    "empty frames": b"\x01\x00",
    "frames of a byte": b"\x01\x01x",
    "answers that were given": zmtp.encode_message([encode(Answer(0, Code.OK))]),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_keeps_nobody_waiting(kind: str) -> None:
    """As fast as it goes, into a read of many places; another peer is fenced meanwhile."""
    owner, reader = RawOwner(), ZmqTransport("reader", {})
    stop = threading.Event()
    try:
        pair = Pair(reader, owner, "big", connected=False)
        tag = pair.connect()
        owner.accept()
        pair.wait(tag)
        pair.read(pair.blocks(range(0, 48, 2)))
        head = encode(Answer(owner.request().serial, Code.OK))
        owner.send(bytes([1, len(head)]) + head if "frame" in kind else zmtp.encode_message([head]))

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    owner.connection.sendall(FLOODS[kind] * 10_000)

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        for _ in range(20):
            start, tag = time.monotonic(), pair.tag()
            reader.fence("another", tag)
            while tag not in pair.ended:
                pair.pump(0.05)
            assert time.monotonic() - start < 2
    finally:
        stop.set()
        reader.close()
        owner.close()
        thread.join(DEADLINE_S)
    assert not reader.abandoned


def test_pings_of_a_peer_that_takes_nothing_fill_no_memory(both: tuple[Pair, RawOwner]) -> None:
    """The answers to all of them would be 40 MB."""
    _, owner = both
    before = rss_mib()
    pings = (b"\x04\x17\x04PING\0\0" + bytes(16)) * 100_000
    for _ in range(18):
        owner.send(pings)
    assert rss_mib() - before < 10


def test_bytes_that_come_slowly_are_no_silence(both: tuple[Pair, RawOwner], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than the thread waits for, for longer than a peer may be silent."""
    monkeypatch.setattr(zmq_reader, "SILENCE_S", 0.9)
    pair, owner = both
    tag = pair.read(one_block(pair, 2))
    whole = answer(owner.request())
    end = time.monotonic() + 3
    at = 0
    while time.monotonic() < end:
        owner.send(whole[at : at + 1000])
        at += 1000
        time.sleep(0.02)
    assert tag not in pair.ended
    owner.send(whole[at:])
    assert pair.wait(tag).status is Status.DONE


def test_a_name_server_keeps_nobody_waiting(both: tuple[Pair, RawOwner], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, owner = both
    asked, answered, real = threading.Event(), threading.Event(), socket.getaddrinfo

    def slow(host: str, *rest: object, **more: object) -> object:
        if host == "slow.example" and not more.get("flags"):
            asked.set()
            answered.wait(DEADLINE_S)
            host = "127.0.0.1"
        return real(host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    other, tags = RawOwner(), {}
    where = msgspec.msgpack.decode(other.describe(), type=Where)
    named = msgspec.structs.replace(where, endpoint=where.endpoint.replace("127.0.0.1", "slow.example"))
    try:
        for name in ("found", "dropped"):
            tags[name] = pair.tag()
            pair.reader.connect(name, msgspec.msgpack.encode(named), tags[name])
        pair.reader.disconnect("dropped")
        assert pair.wait(tags["dropped"]).status is Status.CANCELLED
        assert asked.wait(DEADLINE_S)
        tag = pair.read(one_block(pair, 0))
        owner.send(answer(owner.request()))
        assert pair.wait(tag).status is Status.DONE
        answered.set()
        other.accept()
        assert pair.wait(tags["found"]).status is Status.DONE
    finally:
        answered.set()
        other.close()


def test_a_peer_that_dies_raises_no_signal() -> None:
    """A program may have SIGPIPE end it."""
    code = """
import signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
from pd_connector.testing.pair import Pair
from pd_connector.transport.zmq import ZmqTransport
from tests.conformance.test_zmq_link import RawOwner
for _ in range(10):
    owner, reader = RawOwner(), ZmqTransport("reader", {})
    pair = Pair(reader, owner, "big", connected=False)
    tag = pair.connect()
    owner.accept()
    pair.wait(tag)
    owner.connection.close()
    owner.listener.close()
    print(pair.wait(*[pair.read(pair.blocks(range(63))) for _ in range(3)]).status)
    reader.close()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["peer_lost"] * 10), done.stderr
