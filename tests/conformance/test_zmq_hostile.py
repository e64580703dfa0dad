"""The zmq transport against whoever does not keep to its messages: at the owner's listener and at the reader."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import socket as plain_socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from pd_connector.errors import ConfigError, LocalProtocolError, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region
from pd_connector.testing.owner_process import LocalOwner, ProcessOwner
from pd_connector.testing.pair import CAPABILITY, LEASE, SEED, Pair
from pd_connector.transport.base import LeaseId, Status
from pd_connector.transport.slices import SLICE_BYTES, SLICE_CHUNKS, SLICE_PARTS
from pd_connector.transport.zmq import ZmqTransport
from pd_connector.transport.zmq_wire import (
    VERSION,
    Answer,
    Code,
    Ping,
    Pong,
    Read,
    Request,
    Where,
    decode_where,
    encode,
    encode_request,
)

DEADLINE_S = 20.0
FRAMES = 100_000


def rss_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.fixture
def pair() -> Iterator[Pair]:
    owner, reader = LocalOwner(ZmqTransport("owner", {}), "mixed", SEED), ZmqTransport("reader", {})
    yield Pair(reader, owner, "mixed")
    reader.close()
    owner.close()


def good_request(serial: int = 1) -> list[bytes]:
    blocks = np.array([1, 5, 9], np.uint32)
    return encode_request(Request(serial, LEASE, CAPABILITY, blocks, ((0, 0, 4096), (1, 8, 100))))


class Fuzz:
    """Messages of every bad kind; what a truncated or replayed one may do is be answered, nothing else."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kinds: list[Callable[[], list[bytes]]] = [
            self.noise,
            self.mutated,
            self.truncated,
            self.oversized_claim,
            self.replayed,
            self.many_frames,
            self.other_shapes,
            self.foreign_lease,
        ]

    def noise(self) -> list[bytes]:
        return [self.rng.randbytes(self.rng.randint(0, 200)) for _ in range(self.rng.randint(1, 4))]

    def mutated(self) -> list[bytes]:
        frames = [bytearray(frame) for frame in good_request(self.rng.randrange(2**32))]
        for _ in range(self.rng.randint(1, 8)):
            frame = self.rng.choice(frames)
            frame[self.rng.randrange(len(frame))] = self.rng.randrange(256)
        return [bytes(frame) for frame in frames]

    def truncated(self) -> list[bytes]:
        frames = good_request()
        return [frame[: self.rng.randint(0, len(frame) - 1)] for frame in frames[: self.rng.randint(1, 2)]]

    def oversized_claim(self) -> list[bytes]:
        blocks = np.arange(self.rng.choice([1, SLICE_CHUNKS, SLICE_CHUNKS + 1]), dtype=np.uint32)
        parts = tuple((0, 0, SLICE_BYTES) for _ in range(self.rng.choice([1, SLICE_PARTS, SLICE_PARTS + 1])))
        return encode_request(Request(1, LEASE, CAPABILITY, blocks, parts))

    def replayed(self) -> list[bytes]:
        return good_request(1)

    def many_frames(self) -> list[bytes]:
        return good_request() + [b"x" * self.rng.randint(0, 50) for _ in range(self.rng.randint(1, 40))]

    def other_shapes(self) -> list[bytes]:
        thing = self.rng.choice(
            [None, {}, [], [2], [9, 1], [2, -1, 0, 0, b"", []], "x" * 100, [[[[[]]]]], 1.5, [1, b"short"]]
        )
        return [msgspec.msgpack.encode(thing), b"\0" * self.rng.randint(0, 9)]

    def foreign_lease(self) -> list[bytes]:
        blocks = np.array([self.rng.randrange(2**32)], np.uint32)
        lease = LeaseId(self.rng.randrange(2**40), self.rng.randrange(9))
        return encode_request(Request(1, lease, self.rng.randbytes(16), blocks, ((self.rng.randrange(9), 0, 8),)))

    def message(self) -> list[bytes]:
        return self.rng.choice(self.kinds)()


@pytest.mark.timeout(300)
def test_100_000_bad_messages_leave_the_listener_alive(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    fuzz = Fuzz(SEED)
    endpoint = decode_where(pair.owner.describe()).endpoint
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket, caplog.at_level(logging.DEBUG):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(DEADLINE_S * 1000))
        socket.connect(endpoint)

        def send(count: int) -> None:
            for _ in range(count):
                socket.send_multipart(fuzz.message())
                while socket.poll(0):
                    socket.recv_multipart()  # refusals, and the answers to replays
            # A message of ours that comes back: everything sent before it has been handled.
            socket.send(encode(Ping(b"n" * 16)))
            while True:
                assert socket.poll(DEADLINE_S * 1000), "the listener is deaf"
                if socket.recv_multipart() == [encode(Pong(b"n" * 16, decode_where(pair.owner.describe()).instance))]:
                    return

        send(FRAMES // 10)
        gc.collect()
        before = rss_bytes()
        send(FRAMES - FRAMES // 10)
        gc.collect()
        grown = rss_bytes() - before
    assert grown < 10 << 20, f"{grown / 2**20:.1f} MiB more after {FRAMES} bad messages"
    transport = pair.owner.transport  # type: ignore[attr-defined]
    assert transport.counters()["malformed"] > FRAMES // 4
    assert transport.counters()["refused"] > FRAMES // 20
    assert len(caplog.records) <= 30, "more than one line per interval"
    pair.settle()


def test_a_frame_beyond_the_limit_closes_only_its_connection(pair: Pair) -> None:
    endpoint = decode_where(pair.owner.describe()).endpoint
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(endpoint)
        socket.send(b"x" * (8 << 20))
        assert monitor.poll(DEADLINE_S * 1000), "the connection stayed open"
        socket.disable_monitor()
        monitor.close()
    pair.settle()


def test_a_peer_that_speaks_no_zeromq_harms_nobody(pair: Pair) -> None:
    host, port = decode_where(pair.owner.describe()).endpoint.removeprefix("tcp://").split(":")
    for opening in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, random.Random(1).randbytes(5000)):
        with plain_socket.create_connection((host, int(port)), DEADLINE_S) as raw:
            raw.sendall(opening)
    pair.settle()


def test_requests_at_the_bounds_are_served(pair: Pair) -> None:
    """The limits are what a reader may ask for, not one less."""
    endpoint = decode_where(pair.owner.describe()).endpoint
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        size = SLICE_BYTES // SLICE_CHUNKS
        for blocks, parts in ((SLICE_CHUNKS, 1), (SLICE_CHUNKS // SLICE_PARTS, SLICE_PARTS)):
            ids = np.arange(blocks, dtype=np.uint32) % 48
            socket.send_multipart(encode_request(Request(blocks, LEASE, CAPABILITY, ids, ((0, 0, size),) * parts)))
            assert socket.poll(DEADLINE_S * 1000)
            head, *frames = socket.recv_multipart()
            assert head == encode(Answer(blocks, Code.OK))
            assert sum(map(len, frames)) == blocks * parts * size == SLICE_BYTES


def test_memory_outlives_its_registration_while_frames_of_it_are_queued() -> None:
    """A reader that takes its time gets the bytes it was promised, not whatever malloc put there since."""
    owner = LocalOwner(ZmqTransport("owner", {}), "big", SEED)
    owner.grant(LEASE, CAPABILITY, {0: range(64)})
    each = SLICE_BYTES >> 20  # blocks of 1 MiB in a slice
    expected = owner.arena.arrays[0][: 8 * SLICE_BYTES].tobytes()
    array, endpoint = weakref.ref(owner.arena.arrays[0]), decode_where(owner.describe()).endpoint
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 1)  # so that most answers wait at the owner
        socket.connect(endpoint)
        for index in range(8):
            blocks = np.arange(index * each, (index + 1) * each, dtype=np.uint32)
            socket.send_multipart(encode_request(Request(index, LEASE, CAPABILITY, blocks, ((0, 0, 1 << 20),))))
        end = time.monotonic() + DEADLINE_S
        while owner.transport.counters()["slices_served"] < 8:
            assert time.monotonic() < end
            time.sleep(0.01)
        owner.transport.revoke(LEASE)
        owner.transport.unregister()
        del owner.arena
        gc.collect()
        assert array() is not None, "nothing pins the memory"
        got = b""
        for _ in range(8):
            assert socket.poll(DEADLINE_S * 1000)
            got += b"".join(socket.recv_multipart()[1:])
        assert got == expected
    owner.close()
    end = time.monotonic() + DEADLINE_S
    while array() is not None:
        assert time.monotonic() < end, "the memory is pinned for ever"
        gc.collect()
        time.sleep(0.01)


class FakeOwner:
    """A ROUTER that answers each read request with whatever ``reply`` makes of it."""

    extra: tuple[bytes, ...] = ()  # frames behind a pong

    def __init__(self, reply: Callable[[Read, list[bytes]], list[list[bytes]]], instance: bytes = b"i" * 16) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.reply, self.instance = reply, instance
        self.socket = self.context.socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.where = msgspec.msgpack.encode(Where(VERSION, f"tcp://127.0.0.1:{port}", b"i" * 16))
        self.stop, self.thread = threading.Event(), threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while not self.stop.is_set():
            if not self.socket.poll(20):
                continue
            peer, head, *rest = self.socket.recv_multipart()
            message = msgspec.msgpack.decode(head, type=Ping | Read)
            if isinstance(message, Ping):
                self.socket.send_multipart([peer, encode(Pong(message.nonce, self.instance)), *self.extra])
            else:
                for frames in self.reply(message, rest):
                    self.socket.send_multipart([peer, *frames])

    def describe(self) -> bytes:
        return self.where

    def grant(self, *_: object) -> None:
        pass

    def revoke(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self.stop.set()
        self.thread.join(DEADLINE_S)
        self.context.destroy(linger=0)


def stream(read: Read) -> bytes:
    return b"g" * sum(size for _, _, size in read.parts)


BAD_ANSWERS: dict[str, Callable[[Read, list[bytes]], list[list[bytes]]]] = {
    "too short": lambda read, _: [[encode(Answer(read.serial, Code.OK)), stream(read)[:-1]]],
    "nothing": lambda read, _: [[encode(Answer(read.serial, Code.OK))]],
    "too long": lambda read, _: [[encode(Answer(read.serial, Code.OK)), stream(read), b"overrun" * 1000]],
    "never asked for": lambda read, _: [[encode(Answer(read.serial + 1000, Code.OK)), stream(read)]],
    "noise": lambda _, __: [[b"\xc1\xff", b"noise"]],
    "unknown code": lambda read, _: [[msgspec.msgpack.encode([4, read.serial, 77, ""])]],
    "pong of another ping": lambda _, __: [[encode(Pong(b"?" * 16, b"i" * 16))]],
    "a request": lambda read, _: [[encode(read)]],
    "endless detail": lambda read, _: [[msgspec.msgpack.encode([4, read.serial, 1, "d" * 5000])]],
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_is_an_error_and_writes_nothing_outside(kind: str) -> None:
    owner, reader = FakeOwner(BAD_ANSWERS[kind]), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "mixed")
        plan = pair.blocks([1])
        pair.target.poison()
        outside = pair.target.expect(plan, pair.target, pair.target.arrays)
        assert pair.wait(pair.read(plan)).status is Status.ERROR
        # Inside the planned blocks anything may lie now; put the poison back there and compare everything else.
        for pattern in plan.patterns:
            pair.target.chunk(pair.target.arrays, pattern.dst_grid, 1, 0, pattern.run_bytes)[:] = 0xA5
        assert pair.target.same(outside)
        assert reader.counters()["malformed_answers"] == 1
        # The peer stays refused until it is connected again.
        assert pair.wait(pair.read(plan)).status is Status.PEER_LOST
        assert pair.wait(pair.connect()).status is Status.DONE
    finally:
        reader.close()
        owner.close()


def test_a_duplicate_answer_is_ignored() -> None:
    def twice(read: Read, _: list[bytes]) -> list[list[bytes]]:
        first = [encode(Answer(read.serial, Code.OK)), stream(read)]
        return [first, [first[0], stream(read).replace(b"g", b"x")]]

    owner, reader = FakeOwner(twice), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "mixed")
        for block in (1, 2, 3):
            assert pair.wait(pair.read(pair.blocks([block]))).status is Status.DONE
            assert set(pair.target.chunk(pair.target.arrays, 0, block, 0, 4096).tolist()) == {ord("g")}
        pair.until(lambda: reader.counters()["malformed_answers"] == 3, "three duplicates counted")
    finally:
        reader.close()
        owner.close()


def test_frames_may_be_cut_anywhere() -> None:
    rng = random.Random(SEED)

    def chopped(read: Read, _: list[bytes]) -> list[list[bytes]]:
        data, frames = random.Random(5).randbytes(sum(size for _, _, size in read.parts)), []
        while data:
            size = rng.choice([0, 1, 7, 4096, 50_000])
            frames.append(data[:size])
            data = data[size:]
        return [[encode(Answer(read.serial, Code.OK)), *frames, b""]]

    owner, reader = FakeOwner(chopped), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "mixed")
        assert pair.wait(pair.read(pair.blocks([1]))).status is Status.DONE
        whole = random.Random(5).randbytes(4 * 4096 + 65536)
        arrays, plan = pair.target.arrays, pair.blocks([1])
        chunks = [pair.target.chunk(arrays, p.dst_grid, 1, 0, p.run_bytes).tobytes() for p in plan.patterns]
        assert b"".join(chunks) == whole
    finally:
        reader.close()
        owner.close()


def test_another_agent_at_the_address_is_not_the_peer() -> None:
    owner, reader = FakeOwner(lambda *_: [], instance=b"other" * 3 + b"!"), ZmqTransport("reader", {})
    try:
        reader.connect("peer", owner.describe(), 1)
        end = time.monotonic() + DEADLINE_S
        found = []
        while not found and time.monotonic() < end:
            found = reader.poll(4)
        assert [(each.tag, each.status) for each in found] == [(1, Status.PEER_LOST)]
        assert "another agent" in found[0].detail
    finally:
        reader.close()
        owner.close()


def test_a_silent_peer_is_left_to_the_callers_patience() -> None:
    owner, reader = FakeOwner(lambda *_: []), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "mixed")
        read, other = pair.read(pair.blocks([1])), pair.read(pair.blocks([2]))
        reader.cancel(read)
        assert pair.wait(read).status is Status.CANCELLED
        assert other not in pair.ended
        assert pair.wait(pair.fence()).status is Status.DONE
        assert pair.ended[other].status is Status.CANCELLED
    finally:
        reader.close()
        owner.close()


# Options and resources


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hots": "127.0.0.1"}, "host"),
        ({"port": "x"}, "port"),
        ({"port": 70000}, "70000"),
        ({"cpus": "all"}, "cpus"),
        ({"host": "0.0.0.0"}, "advertise"),
        ({"zzz": 1}, "known"),
    ],
)
def test_bad_options_name_the_remedy(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ZmqTransport("a", options)


def test_a_port_in_use_is_said(pair: Pair) -> None:
    port = int(decode_where(pair.owner.describe()).endpoint.rpartition(":")[2])
    with pytest.raises(TransportUnavailable, match=str(port)):
        ZmqTransport("a", {"port": port})


def test_the_advertised_host_is_described() -> None:
    transport = ZmqTransport("a", {"host": "0.0.0.0", "advertise": "node7.example"})
    assert decode_where(transport.describe()).endpoint.startswith("tcp://node7.example:")
    transport.close()


def test_ipv6() -> None:
    try:
        owner = LocalOwner(ZmqTransport("owner", {"host": "::1"}), "mixed", SEED)
    except TransportUnavailable:
        pytest.skip("no IPv6 loopback here")
    reader = ZmqTransport("reader", {})
    Pair(reader, owner, "mixed").settle()
    reader.close()
    owner.close()


def test_device_memory_is_refused() -> None:
    transport = ZmqTransport("a", {})
    try:
        with pytest.raises(LocalProtocolError, match="host memory"):
            transport.register([Region(4096, 4096, (BlockGrid(0, 0, 0, 64, 64, 1),), MemoryKind.CUDA)])
    finally:
        transport.close()


def test_nothing_is_left_behind() -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def cycle() -> None:
        owner, reader = LocalOwner(ZmqTransport("owner", {}), "mixed", SEED), ZmqTransport("reader", {})
        Pair(reader, owner, "mixed").settle()
        reader.close()
        owner.close()

    cycle()
    before = resources()
    for _ in range(5):
        cycle()
    assert resources() == before


def test_an_idle_transport_sleeps(pair: Pair) -> None:
    """No fast timer, no polling: CPU time, not wall time, so that a busy machine does not matter."""
    start = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - start < 0.2


def test_its_threads_leave_the_core_an_engine_pinned_them_to() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core only")
    before = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        free, pinned = ZmqTransport("free", {}), ZmqTransport("pinned", {"cpus": [max(allowed)]})
        new = {int(task): os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - before}
        free.close()
        pinned.close()
    finally:
        os.sched_setaffinity(0, allowed)
    assert {frozenset(cpus) for cpus in new.values()} == {frozenset(allowed), frozenset({max(allowed)})}


@pytest.mark.timeout(120)
def test_a_peer_whose_host_stops_answering_is_lost() -> None:
    """Without a FIN only the heartbeat tells: a stopped process stands in for a host that lost its power."""
    owner, reader = ProcessOwner("zmq", {}, "big", SEED), ZmqTransport("reader", {})
    try:
        pair = Pair(reader, owner, "big")
        owner.signal(signal.SIGSTOP)
        tag, end = pair.read(pair.blocks(range(63))), time.monotonic() + 60
        while tag not in pair.ended and time.monotonic() < end:
            pair.pump(1.0)
        assert pair.ended[tag].status is Status.PEER_LOST
        owner.signal(signal.SIGCONT)
        assert pair.wait(pair.connect()).status is Status.DONE
        pair.settle()
    finally:
        reader.close()
        owner.close()


@pytest.mark.parametrize("instance", [b"i" * 16, b"x" * 16])
def test_a_pong_with_frames_costs_its_sender_alone(instance: bytes) -> None:
    reader, bad, good = ZmqTransport("reader", {}), FakeOwner(lambda *_: [], instance), FakeOwner(lambda *_: [])
    bad.extra = (b"more",)
    for tag, owner in enumerate((bad, good)):
        reader.connect(str(tag), owner.describe(), tag)
        while not (completions := reader.poll(1)):
            time.sleep(0.01)  # the suite's own deadline ends this
        assert (completions[0].status is Status.DONE) == (owner is good)
    for closing in (reader, bad, good):
        closing.close()
