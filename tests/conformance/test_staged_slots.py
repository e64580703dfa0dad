"""What a staged transport promises about its slots, seen by a reader that misbehaves, and what its devices may do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_reader import SLOTS, Raw, counter

from pd_connector.errors import ConfigError, LocalProtocolError, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region, native
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, DEADLINE_S, LEASE, SEED, Pair
from pd_connector.transport import staged_owner, staged_reader
from pd_connector.transport.base import LeaseId, Status
from pd_connector.transport.device import Device, Direction, Moves, why_no_device
from pd_connector.transport.staged import StagedShm, StagedZmq
from pd_connector.transport.staged_wire import (
    Code,
    Filled,
    Held,
    Refused,
    Return,
    Void,
    decode_where,
    encode,
)

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


@pytest.fixture
def pair(closing: list[Any]) -> Pair:
    owner = LocalOwner(StagedShm("owner", {}), "big", SEED)
    closing.append(owner)
    reader = StagedShm("reader", {})
    closing.append(reader)
    made = Pair(reader, owner, "big")
    made.target.poison()
    return made


class Gate:
    """Device moves in one direction stop here until it is opened; ``error`` is what they raise then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, direction: Direction, error: Exception | None = None) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        move = Device.move

        def gated(device: Device, moves: Moves, which: Direction) -> None:
            if which is direction:
                self.reached.set()
                assert self.opened.wait(DEADLINE_S)
                if error is not None:
                    raise error
            move(device, moves, which)

        monkeypatch.setattr(Device, "move", gated)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# The rules of slots


def test_a_slot_that_is_given_back_was_held(raw: Callable[[], Raw]) -> None:
    reader = raw()
    for _ in range(3 * SLOTS):
        reader.fill()
        assert isinstance(reader.give_back(reader.filled()), Held)


def test_a_late_return_is_void(
    owner: LocalOwner, raw: Callable[[], Raw], monkeypatch: pytest.MonkeyPatch, closing: list[Any]
) -> None:
    monkeypatch.setattr(staged_owner, "HOLD_S", 0.2)
    quick = LocalOwner(StagedZmq("quick", {"slots": 1}), "mixed", SEED)
    closing.append(quick)
    quick.grant(LEASE, CAPABILITY, {0: range(48)})
    slow, other = Raw(quick), Raw(quick)
    closing += [slow, other]
    slow.fill(block=1)
    late = slow.filled()
    other.fill(block=2)
    filled = other.filled()  # only once the slot of the first one is free again
    assert filled.slot == late.slot
    assert filled.epoch > late.epoch
    answer = slow.give_back(late)
    assert isinstance(answer, Void)
    assert answer.code is Code.LATE
    assert counter(quick, "slots_late") >= 1


def test_a_slot_of_a_revoked_lease_is_void(owner: LocalOwner, raw: Callable[[], Raw]) -> None:
    owner.grant(LeaseId(8, 1), CAPABILITY, {0: range(48)})
    reader = raw()
    reader.fill()
    reader.fill(LeaseId(8, 1))
    revoked, kept = reader.filled(), reader.filled()
    owner.revoke(LEASE)
    owner.grant(LEASE, CAPABILITY, {0: range(48)})  # again: what was lent before stays void
    answer = reader.give_back(revoked)
    assert isinstance(answer, Void)
    assert answer.code is Code.NOT_GRANTED
    assert isinstance(reader.give_back(kept), Held)


def test_a_lease_that_ends_while_a_slot_is_filled_is_refused(
    owner: LocalOwner, raw: Callable[[], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reader = Gate(monkeypatch, Direction.TO_HOST), raw()
    reader.fill()
    assert gate.reached.wait(DEADLINE_S)
    owner.revoke(LEASE)
    owner.grant(LEASE, CAPABILITY, {0: range(48)})
    gate.opened.set()
    answer = reader.answer()
    assert isinstance(answer, Refused)
    assert answer.code is Code.NOT_GRANTED
    for _ in range(SLOTS):
        reader.fill()
        assert isinstance(reader.give_back(reader.filled()), Held)


def test_a_reader_has_no_more_than_its_share(raw: Callable[[], Raw]) -> None:
    reader = raw()
    for _ in range(3 * SLOTS):
        reader.fill()
    held = [reader.filled() for _ in range(SLOTS // 2)]
    assert reader.is_silent()
    for each in held:
        reader.send(encode(Return(each.serial, each.slot, each.epoch)))
    answers = [reader.answer() for _ in range(2 * len(held))]
    assert sum(isinstance(answer, Held) for answer in answers) == len(held)
    assert sum(isinstance(answer, Filled) for answer in answers) == len(held)


def test_all_slots_are_a_bound_over_all_readers(raw: Callable[[], Raw]) -> None:
    readers = [raw() for _ in range(3)]
    for reader in readers[:2]:
        for _ in range(SLOTS):
            reader.fill()
    held = [[reader.filled() for _ in range(SLOTS // 2)] for reader in readers[:2]]
    readers[2].fill()
    assert readers[2].is_silent()
    assert isinstance(readers[0].give_back(held[0][0]), Held)
    assert isinstance(readers[2].answer(), Filled), "who holds none comes before who holds some"


def test_too_many_requests_are_refused(raw: Callable[[], Raw], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reader = Gate(monkeypatch, Direction.TO_HOST), raw()
    for _ in range(100):
        reader.fill()
    answer = reader.answer()
    gate.opened.set()
    assert isinstance(answer, Refused)
    assert answer.code is Code.BUSY


def test_a_request_does_not_wait_for_ever(closing: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_owner, "WAIT_S", 0.2)
    owner = LocalOwner(StagedZmq("owner", {"slots": 1}), "mixed", SEED)
    closing.append(owner)
    owner.grant(LEASE, CAPABILITY, {0: range(48)})
    reader = Raw(owner)
    closing.append(reader)
    reader.fill()
    reader.filled()
    reader.fill()
    answer = reader.answer()
    assert isinstance(answer, Refused)
    assert answer.code is Code.BUSY


def test_a_reader_that_dies_gives_its_slots_back(closing: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_owner, "HOLD_S", 0.5)
    owner = LocalOwner(StagedZmq("owner", {"slots": 2}), "mixed", SEED)
    closing.append(owner)
    owner.grant(LEASE, CAPABILITY, {0: range(48)})
    dying, living = Raw(owner), Raw(owner)
    closing.append(living)
    for _ in range(5):
        dying.fill()
    held = [dying.filled(), dying.filled()]
    dying.close()
    living.fill()
    assert living.filled().slot in {each.slot for each in held}


def test_nobody_gives_back_what_others_hold(raw: Callable[[], Raw]) -> None:
    reader, thief = raw(), raw()
    reader.fill()
    filled = reader.filled()
    assert isinstance(thief.give_back(filled), Void)
    assert isinstance(reader.give_back(filled), Held)
    answer = reader.give_back(filled)
    assert isinstance(answer, Void)


def test_two_readers_are_served_alike(owner: LocalOwner, closing: list[Any]) -> None:
    """The second one's few slices do not wait for all of the first one's many."""
    readers = [StagedZmq(f"reader{n}", {"slots": 2}) for n in range(2)]
    closing += readers
    many, few = (Pair(reader, owner, "mixed") for reader in readers)
    for _ in range(8):
        long = many.blocks(range(48))
        slow = many.read(type(long)(long.runs, long.patterns * 12))
        quick = few.read(few.blocks([3]))
        few.wait(quick)
        many.pump()
        if slow not in many.ended:
            break
        assert many.ended[slow].status is Status.DONE
    else:
        pytest.fail("it never came first")
    assert few.ended[quick].status is Status.DONE
    assert many.wait(slow).status is Status.DONE


def test_a_read_whose_slots_come_back_late_is_never_done(closing: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_owner, "HOLD_S", 0.0)
    owner = LocalOwner(StagedShm("owner", {}), "big", SEED)
    closing.append(owner)
    reader = StagedShm("reader", {})
    closing.append(reader)
    pair = Pair(reader, owner, "big")
    monkeypatch.setattr(staged_reader.StagedReader, "_advance", _slowly(staged_reader.StagedReader._advance))
    assert pair.wait(pair.read(pair.blocks(range(8)))).status is Status.ERROR
    assert "in time" in next(iter(pair.ended.values())).detail or any("time" in c.detail for c in pair.ended.values())


def _slowly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    def slow(reader: Any) -> None:
        time.sleep(0.05)
        method(reader)

    return slow


def test_a_slot_that_does_not_arrive_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_reader, "ARRIVE_S", 0.2)
    reader = pair.reader
    assert isinstance(reader, StagedShm)
    monkeypatch.setattr(reader._inner, "post_read", lambda *_: None)
    completion = pair.wait(pair.read(pair.blocks([0])))
    assert completion.status is Status.ERROR
    assert "did not arrive" in completion.detail


# Devices


@pytest.mark.parametrize(
    ("direction", "words"), [(Direction.TO_HOST, "owner's device"), (Direction.TO_DEVICE, "this agent")]
)
def test_a_device_that_fails_ends_the_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, direction: Direction, words: str
) -> None:
    with monkeypatch.context() as patched:
        gate = Gate(patched, direction, LocalProtocolError("planted"))
        gate.opened.set()
        completion = pair.wait(pair.read(pair.blocks(range(8))))
        assert completion.status is Status.ERROR
        assert words in completion.detail
        assert "planted" in completion.detail
    assert pair.wait(pair.read(pair.blocks(range(8)))).status is Status.DONE


@pytest.mark.parametrize("how", ["cancel", "fence", "disconnect"])
def test_a_read_ends_only_after_its_running_move(pair: Pair, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    gate = Gate(monkeypatch, Direction.TO_DEVICE)
    tag = pair.read(pair.blocks(range(63)))
    assert gate.reached.wait(DEADLINE_S)
    fence = None
    if how == "cancel":
        pair.reader.cancel(tag)
    elif how == "fence":
        fence = pair.fence()
    else:
        pair.reader.disconnect("owner#1")
        fence = pair.fence()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pair.pump(0.05)
    assert tag not in pair.ended
    assert fence not in pair.ended
    gate.opened.set()
    assert pair.wait(tag).status is Status.CANCELLED
    if fence is not None:
        assert pair.wait(fence).status is Status.DONE
    pair.target.poison()
    before = pair.target.snapshot()
    pair.wait(pair.connect())
    pair.settle()
    assert pair.target.same(pair.target.expect(pair.blocks([0]), pair.source, before))


def test_regions_are_of_one_kind_that_has_a_device(owner: LocalOwner) -> None:
    grid = BlockGrid(0, 0, 0, 64, 64, 1)
    with pytest.raises(TransportUnavailable, match="cuda and host"):
        owner.transport.register([Region(4096, 64, (grid,)), Region(8192, 64, (grid,), MemoryKind.CUDA)])
    if why_no_device(MemoryKind.CUDA) is not None:
        with pytest.raises(TransportUnavailable, match="cuda"):
            owner.transport.register([Region(8192, 64, (grid,), MemoryKind.CUDA)])


# Options and resources


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slot": 4}, "slots"),
        ({"slots": 0}, "slots"),
        ({"slot_bytes": 100}, "slot_bytes"),
        ({"inner": {"hots": "x"}}, "host"),
        ({"host": "0.0.0.0"}, "advertise"),
    ],
)
def test_bad_options_name_the_remedy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StagedZmq("a", options)


def test_inner_has_its_own_options() -> None:
    transport = StagedZmq("a", {"host": "0.0.0.0", "advertise": "node7", "inner": {"advertise": "node8"}})
    where = decode_where(transport.describe(), "staged-zmq")
    assert where.endpoint.startswith("tcp://node7:")
    assert b"tcp://node8:" in where.inner
    transport.close()


def test_nothing_is_left_behind() -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def cycle() -> None:
        owner, reader = LocalOwner(StagedZmq("owner", {}), "mixed", SEED), StagedZmq("reader", {})
        Pair(reader, owner, "mixed").settle()
        reader.close()
        owner.close()
        with pytest.raises(TransportUnavailable):
            StagedZmq("a", {"host": "203.0.113.1"})

    cycle()
    before = resources()
    for _ in range(3):
        cycle()
    until(lambda: resources() == before)
