"""A staged transport among peers that break its rules, and connections that break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq
from raw_reader import Raw, counter
from test_zmq_idle import Cable

from pd_connector.memory import native
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, DEADLINE_S, LEASE, SEED, Pair
from pd_connector.transport.base import Status
from pd_connector.transport.staged import StagedZmq
from pd_connector.transport.staged_wire import Code, Fill, Filled, Held, Ping, Pong, Refused, Void, decode_where, encode

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


@pytest.mark.parametrize(
    "frames",
    [
        (b"\xc1",),
        (b"",),
        (b"x", b"y", b"z"),
        (msgspec.msgpack.encode([2, 1, 7, 1, CAPABILITY, [[0, 0, 4096]]]),),
        (msgspec.msgpack.encode([2, 1, 7, 1, CAPABILITY, [[0, 0, 4096]]]), b"abc"),
        (msgspec.msgpack.encode([2, 1, 7, 1, CAPABILITY, [[0, 0, 2**40]]]), bytes(4)),
        (msgspec.msgpack.encode([2, 1, 7, 1, CAPABILITY, [[0, 0, 1]] * 100]), bytes(4 * 4096)),
        (msgspec.msgpack.encode([3, 1, 10**6, 1]),),
    ],
)
def test_a_malformed_request_is_counted_and_dropped(
    owner: LocalOwner, raw: Callable[[], Raw], frames: tuple[bytes, ...]
) -> None:
    reader = raw()
    reader.send(*frames)
    reader.send(encode(Ping(b"n" * 16)))
    assert isinstance(reader.answer(), Pong)
    assert counter(owner, "malformed") == 1


@pytest.mark.parametrize(("block", "size"), [(48, 8), (0, 4097), (0, 8 << 20)])
def test_an_address_that_does_not_exist_is_refused(raw: Callable[[], Raw], block: int, size: int) -> None:
    reader = raw()
    reader.fill(block=block, size=size)
    answer = reader.answer()
    assert isinstance(answer, Refused)
    assert answer.code in (Code.REFUSED, Code.NOT_GRANTED)


def test_more_than_a_slot_holds_is_refused(closing: list[Any]) -> None:
    owner = LocalOwner(StagedZmq("owner", {"slot_bytes": 4096}), "big", SEED)
    closing.append(owner)
    owner.grant(LEASE, CAPABILITY, {0: range(64)})
    reader = Raw(owner)
    closing.append(reader)
    reader.fill(size=4097)
    answer = reader.answer()
    assert isinstance(answer, Refused)
    assert "4096" in answer.detail


def wrong_bytes(fill: Fill) -> list[bytes]:
    return [encode(Filled(fill.serial, 0, 1, CAPABILITY, 1))]


BAD_ANSWERS: dict[str, Callable[[Fill], list[bytes]]] = {
    "another size": wrong_bytes,
    "never asked for": lambda fill: [encode(Refused(fill.serial + 1, Code.REFUSED))],
    "held before it came back": lambda fill: [encode(Held(fill.serial))],
    "void before it came back": lambda fill: [encode(Void(fill.serial, Code.LATE))],
    "noise": lambda _: [b"\xc1"],
    "more frames": lambda fill: [encode(Refused(fill.serial, Code.REFUSED)), b""],
    "a slot beyond all bounds": lambda fill: [msgspec.msgpack.encode([5, fill.serial, 10**6, 1, CAPABILITY, 8])],
    "a pong of another ping": lambda _: [encode(Pong(b"?" * 16, b"i" * 16))],
}


class FakeOwner:
    """Describes itself with the inner transport of a real one, greets, and answers a Fill with what it is told to."""

    def __init__(self, real: LocalOwner, reply: Callable[[Fill], list[bytes]]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket, self._reply = self._context.socket(zmq.ROUTER), reply
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        where = decode_where(real.describe(), "staged-zmq")
        self._where = msgspec.structs.replace(where, endpoint=f"tcp://127.0.0.1:{port}")
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(20):
                peer, head, *_ = self._socket.recv_multipart()
                message = msgspec.msgpack.decode(head, type=Ping | Fill)
                if isinstance(message, Ping):
                    self._socket.send_multipart([peer, encode(Pong(message.nonce, self._where.instance))])
                else:
                    self._socket.send_multipart([peer, *self._reply(message)])

    def describe(self) -> bytes:
        return encode(self._where)

    def grant(self, *_: object) -> None:
        pass

    def revoke(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        self._context.destroy(linger=0)


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_is_an_error_and_writes_nothing(owner: LocalOwner, closing: list[Any], kind: str) -> None:
    fake, reader = FakeOwner(owner, BAD_ANSWERS[kind]), StagedZmq("reader", {})
    closing += [fake, reader]
    pair = Pair(reader, fake, "mixed")
    before = pair.target.snapshot()
    assert pair.wait(pair.read(pair.blocks([1]))).status is Status.ERROR
    assert pair.target.same(before)
    assert reader.counters()["malformed_answers"] == 1
    assert pair.wait(pair.read(pair.blocks([1]))).status is Status.PEER_LOST
    assert pair.wait(pair.connect()).status is Status.DONE


def test_a_connection_that_breaks_while_nobody_reads_costs_nothing(owner: LocalOwner, closing: list[Any]) -> None:
    where = decode_where(owner.describe(), "staged-zmq")
    host, _, port = where.endpoint.removeprefix("tcp://").rpartition(":")
    cable, reader = Cable((host, int(port))), StagedZmq("reader", {})
    closing += [cable, reader]
    through = msgspec.structs.replace(where, endpoint=f"tcp://127.0.0.1:{cable.port}")
    owner.describe = lambda: encode(through)  # type: ignore[method-assign]
    pair = Pair(reader, owner, "mixed")
    for _ in range(3):
        pair.settle()
        cable.cut()
        time.sleep(0.3)
    cable.close()
    assert pair.wait(pair.read(pair.blocks([1]))).status is Status.PEER_LOST
