"""Frames: plain MessagePack, bounded, and nothing but RemoteProtocolError for what is not one of ours."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Identity
from pd_connector.protocol.core import Core
from pd_connector.protocol.events import Received, Tick
from pd_connector.protocol.ticket import MAX_BLOCKS, Ticket

from .bench import CAPABILITY, Bench, layout, plan, ready_pair

LEASE = {"lease": 7, "epoch": 2, "capability": CAPABILITY}
WHO = {"version": m.VERSION, "agent": "d", "model": "m", "layout": layout(), "transports": {"t": b"here"}}
FIELDS: dict[type[m.Message], dict[str, Any]] = {
    m.Hello: WHO,
    m.Welcome: {**WHO, "refused": "no", "directory": (m.Endpoint(0, "there", 9, layout()),)},
    m.Open: {**LEASE, "transfer": 3, "reader": "d", "transport": "t"},
    m.Opened: {"transfer": 3, "held": True, "reason": "", "remaining_ms": 1000},
    m.Ready: {
        "transfer": 3,
        "lease": 7,
        "epoch": 2,
        "tokens": (5, 0),
        "first": (1, 0),
        "blocks": (b"\1\0\0\0", b""),
        "complete": False,
    },
    m.Await: {"capability": CAPABILITY},
    m.Granted: {"capability": CAPABILITY, "held": True, "lease": 7, "epoch": 2, "tokens": 9, "key": b"k", "groups": 2},
    m.Renounce: {"capability": CAPABILITY},
    m.Saved: {"of": CAPABILITY, "ticket": b"a ticket", "remaining_ms": 600_000, "reason": "none"},
    m.Account: {"of": CAPABILITY, "clock": "boot", "times": m.DecodeTimes(arrived=2**63, read=5, loaded=9)},
    m.Commit: {
        **LEASE,
        "transfer": 3,
        "part": 1,
        "reader": "d",
        "final": True,
        "audit": m.Audit((m.AuditPlan(b"x" * 12, ((0, 5, 6, ((2, 8),)),)),), b"y" * 24),
    },
    m.Verdict: {"transfer": 3, "part": 1, "held": False, "reason": "gone", "compared": 4},
    m.Renew: LEASE,
    m.Renewed: {"lease": 7, "epoch": 2, "held": True, "remaining_ms": 5},
    m.Release: {**LEASE, "reader": "d"},
    m.Stale: {"incarnation": 2**64 - 1},
    m.Refused: {"transfer": 3, "reason": "full"},
    m.Bye: {},
}
KINDS: tuple[type[m.Message], ...] = get_args(m.AnyMessage)
Change = Callable[[dict[str, Any]], object]


def example(kind: type[m.Message]) -> m.Message:
    return kind(src=2**63, dst=5, **FIELDS[kind])


def reencoded(kind: type[m.Message], change: Change) -> bytes:
    """A frame of this kind with its plain MessagePack map changed."""
    body = msgpack.unpackb(m.encode(example(kind)))
    change(body)
    return bytes(msgpack.packb(body))


def test_every_kind_has_an_example() -> None:
    assert set(FIELDS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_survives_the_wire(kind: type[m.Message]) -> None:
    assert m.decode(m.encode(example(kind))) == example(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_plain_messagepack(kind: type[m.Message]) -> None:
    body = msgpack.unpackb(m.encode(example(kind)), use_list=False)
    assert body["kind"] == kind.__name__.lower()
    assert (body["src"], body["dst"]) == (2**63, 5)
    for name in FIELDS[kind]:
        assert body[name] == msgspec.to_builtins(getattr(example(kind), name), builtin_types=(bytes,))
    assert m.decode(msgpack.packb(body)) == example(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked(kind: type[m.Message]) -> None:
    for name in msgpack.unpackb(m.encode(example(kind))):

        def spoil(body: dict[str, Any], name: str = name) -> None:
            body[name] = {"not": "this"} if name != "transports" else 5

        with pytest.raises(RemoteProtocolError):
            m.decode(reencoded(kind, spoil))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_fields_are_missed(kind: type[m.Message]) -> None:
    for name in ("kind", "src", "dst"):
        with pytest.raises(RemoteProtocolError):
            m.decode(reencoded(kind, lambda body, name=name: body.pop(name)))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (m.Bye, "src", -1),
        (m.Open, "capability", b"short"),
        (m.Open, "capability", b"long" * 5),
        (m.Open, "epoch", 2**32),
        (m.Open, "reader", "x" * 257),
        (m.Commit, "part", 2**32),
        (m.Commit, "part", -1),
        (m.Hello, "agent", "x" * 257),
        (m.Hello, "transports", {f"t{n}": b"" for n in range(17)}),
        (m.Hello, "transports", {"t": b"x" * 1025}),
        (m.Hello, "transports", {"x" * 257: b""}),
        (m.Welcome, "directory", [{"rank": 0, "address": "a", "incarnation": 1, "layout": {"groups": []}}] * 4097),
        (m.Open, "readers", 0),
        (m.Release, "readers", 4097),
        (m.Welcome, "refused", "x" * (m.MAX_WORDS + 1)),
        (m.Refused, "reason", "x" * (m.MAX_WORDS + 1)),
        (m.Opened, "remaining_ms", 2**40 + 1),
        (m.Verdict, "compared", 2**32),
        (m.Commit, "audit", {"plans": [{"blocks": b"", "places": [[0, 0, 1, []]] * 16385}], "digests": b""}),
        (m.Commit, "audit", {"plans": [{"blocks": b"", "places": []}], "digests": b""}),
        (m.Commit, "audit", {"plans": [{"blocks": b"", "places": [[0, 0, 1, [[1, 1]] * 4]]}], "digests": b""}),
        (m.Commit, "audit", {"plans": [{"blocks": b"", "places": [[0, 0, 1, [[-1, 1]]]]}], "digests": b""}),
    ],
)
def test_bounds_of_fields(kind: type[m.Message], name: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(reencoded(kind, lambda body: body.__setitem__(name, value)))


def test_frames_are_bounded() -> None:
    body = {"kind": "bye", "src": 1, "dst": 2, "padding": b""}
    room = m.MAX_FRAME - len(msgpack.packb({**body, "padding": b"x" * 2**17})) + 2**17
    largest = msgpack.packb({**body, "padding": b"x" * room})
    assert len(largest) == m.MAX_FRAME
    assert isinstance(m.decode(largest), m.Bye)
    with pytest.raises(RemoteProtocolError, match="limit"):
        m.decode(msgpack.packb({**body, "padding": b"x" * (room + 1)}))


def test_deep_nesting_is_no_message() -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(b"\x91" * 100_000 + b"\xc0")


@given(st.binary(max_size=200))
def test_random_bytes_are_no_message(frame: bytes) -> None:
    try:
        m.decode(frame)
    except RemoteProtocolError:
        return
    raise AssertionError("random bytes of this length never name a kind and both incarnations")


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    frame = bytearray(m.encode(example(draw(st.sampled_from(KINDS)))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(frame) - 1)) if frame else 0
        match draw(st.integers(0, 2)):
            case 0 if frame:
                frame[at] = draw(st.integers(0, 255))
            case 1:
                del frame[at : at + draw(st.integers(0, 20))]
            case _:
                frame[at:at] = draw(st.binary(max_size=10))
    return bytes(frame)


@given(mutated())
def test_a_damaged_frame_is_a_message_or_an_error(frame: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(m.decode(frame), KINDS)


@settings(max_examples=50)
@given(st.lists(mutated() | st.binary(max_size=60), max_size=12), st.booleans())
def test_no_frame_makes_the_core_raise(frames: list[bytes], known: bool) -> None:
    """Also not when the damaged messages are for this incarnation, about a lease and a transfer that are there."""
    bench = Bench()
    owner, reader = ready_pair(bench)
    owner.grant(7, epoch=2)
    reader.pull(owner.ticket(7, 2), plan(), plan(), audit=True)
    bench.settle()
    for agent, other in ((owner, reader), (reader, owner)):
        route = other.address if known else "<somebody"
        for frame in frames:
            agent.feed(Received(route, frame))
            try:
                addressed = {**msgpack.unpackb(frame), "src": other.incarnation, "dst": agent.incarnation}
                agent.feed(Received(route, msgpack.packb(addressed)))
            except (ValueError, TypeError, msgpack.UnpackException):
                continue  # this damage leaves no map to address
    bench.wait(1.0)


def test_many_damaged_frames() -> None:
    """The same in bulk, where hypothesis would take its time."""
    rng, core = random.Random(1), Core(Identity("a", 5))
    frames = [m.encode(example(kind)) for kind in KINDS]
    for n in range(20_000):
        frame = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        core.handle(Received("<d", bytes(frame[: rng.randint(1, len(frame))] if n % 4 == 0 else frame)), n / 1000)
    assert core.counters["malformed_frames"] > 5000
    for table in (core.owner.table._answers, core.owner._parked, core.owner._guests, core.owner._jobs):
        assert len(table) <= 2000
    core.handle(Tick(), 1000.0)
    assert not core.owner._parked


def test_malformed_frames_cost_a_counter() -> None:
    core = Core(Identity("a", 1))
    assert core.handle(Received("x", b"\xc1"), 0.0) == []
    assert core.counters["malformed_frames"] == 1
    assert core.handle(Tick(), 1.0) == []


def test_a_ticket_survives_and_hides_its_capability() -> None:
    ticket = Bench().agent("p").ticket(address="tcp://[::1]:5#" + "0f" * 32)
    assert Ticket.from_bytes(ticket.to_bytes()) == ticket
    assert str(CAPABILITY) not in repr(ticket)
    assert CAPABILITY.hex() not in repr(ticket)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "x" * 257},
        {"address": "in:00ff"},
        {"address": "ipc://x"},
        {"address": "tcp://127.0.0.1"},
        {"capability": b""},
        {"blocks": []},
        {"blocks": [[-1]]},
        {"blocks": [[2**32]]},
        {"blocks": [[0]] * 65},
        {"blocks": [[0] * (MAX_BLOCKS + 1)]},
        {"key": b"x" * 65},
        {"epoch": "one"},
        {"lease": None},
    ],
)
def test_bounds_of_tickets(change: dict[str, object]) -> None:
    body = msgpack.unpackb(Bench().agent("p").ticket(address="tcp://127.0.0.1:5").to_bytes())
    Ticket.from_bytes(msgpack.packb(body))
    with pytest.raises(RemoteProtocolError, match="not a ticket"):
        Ticket.from_bytes(msgpack.packb({**body, **change}))


@given(st.binary(max_size=100))
def test_random_bytes_are_no_ticket(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Ticket.from_bytes(data)
