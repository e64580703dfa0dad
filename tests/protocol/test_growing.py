"""Leases that grow while their blocks are computed, readers that follow them, and capabilities that are awaited."""

from __future__ import annotations

from typing import Any

import pytest

from pd_connector.errors import LeaseExpired, LocalProtocolError, PeerLost, RemoteProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits
from pd_connector.protocol.ticket import MAX_BLOCKS, Ticket

from .bench import CAPABILITY, Agent, Bench, plan

PROMISE = ev.Promise(64, b"key", 1)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def growing(owner: Agent, number: int = 1, epoch: int = 1, **fields: Any) -> Ticket:
    owner.grant(number, epoch, blocks={}, promise=PROMISE, growing=True, **fields)
    return owner.ticket(number, epoch, blocks=((),), tokens=64, key=b"key")


def grow(owner: Agent, blocks: tuple[int, ...], tokens: int, complete: bool = False, number: int = 1) -> None:
    owner.feed(ev.Grow(number, {0: blocks}, (tokens,), complete, b"terms" if complete else b""))


def follow(reader: Agent, ticket: Ticket, timeout: float = 20.0) -> int:
    number = reader.core.new_id()
    reader.feed(ev.Pull(number, ticket, (), timeout, follow=True))
    return number


def ready(agent: Agent) -> list[tuple[tuple[int, ...], list[int], bool]]:
    return [(note.tokens, list(note.blocks[0]), note.complete) for note in agent.noted(ev.BlocksReady)]


# --- following --------------------------------------------------------------------------------------------------------


def test_parts_come_as_blocks_become_ready_and_the_last_verdict_releases(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    bench.settle()
    assert ready(reader) == []
    grow(owner, (4, 9), 16)
    bench.settle()
    reader.feed(ev.Append(number, (plan((4,), (7,)),), False))
    bench.settle()
    assert reader.complete()
    bench.settle()
    assert reader.noted(ev.PartConfirmed) == [ev.PartConfirmed(number, 0)]
    assert reader.outcome(number) is None, "more may come"
    assert owner.lease_ends == []
    grow(owner, (4, 9), 32, complete=True)
    bench.settle()
    assert ready(reader) == [((16,), [4, 9], False), ((32,), [], True)]
    reader.feed(ev.Append(number, (plan((9,), (8,)),), True))
    reader.complete()
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"
    assert end.stats.bytes == 4 * 64
    assert [commit.final for commit in reader.said(m.Commit)] == [False, True]
    assert owner.lease_ends == [(1, 1, "every reader has its blocks")]
    assert owner.idle()
    assert reader.idle()


def test_a_last_part_without_anything_to_read_still_commits(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    grow(owner, (4,), 16, complete=True)
    bench.settle()
    reader.feed(ev.Append(number, (), True))
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"
    assert owner.lease_ends


def test_who_comes_late_hears_of_everything(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    ticket = growing(owner)
    grow(owner, (4,), 16)
    grow(owner, (4, 9), 32)
    follow(reader, ticket)
    bench.settle()
    assert ready(reader) == [((32,), [4, 9], False)]


def test_a_lost_ready_is_made_up_for(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    follow(reader, growing(owner))
    bench.settle()
    bench.drop = (m.Ready,)
    grow(owner, (4,), 16)
    bench.settle()
    bench.drop = ()
    grow(owner, (4, 9), 32)
    bench.settle()
    assert ready(reader) == [((32,), [4, 9], False)], "the gap was noticed, and all of it told again"
    bench.drop = (m.Ready,)
    grow(owner, (4, 9, 5), 48, complete=True)
    bench.settle()
    bench.drop = ()
    bench.wait(15.0)
    assert ready(reader)[-1] == ((48,), [5], True), "nothing came after the lost one: asked for while renewing"


def test_each_wait_has_the_deadline_not_the_whole(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner, cap_seconds=600.0), timeout=3.0)
    for step in range(1, 5):
        bench.wait(2.0)
        grow(owner, tuple(range(step)), 16 * step)
        bench.settle()
        reader.feed(ev.Append(number, (), False))
    assert reader.outcome(number) is None
    bench.wait(4.0)
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, PeerLost)
    assert "no end within 3 s" in str(end.error)


def test_followers_are_told_at_once_when_the_lease_ends(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    bench.settle()
    owner.feed(ev.End(1, "preempted", again=True))
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, LeaseExpired)
    assert end.error.again
    grow(owner, (4,), 16)  # late: the lease has ended
    again = follow(reader, owner.ticket(1, 2, blocks=((),)))
    bench.wait(5.0)  # longer than a request for an ungranted lease is parked
    assert reader.outcome(again) is None
    growing(owner, 1, 2)
    bench.wait(1.0)
    grow(owner, (6,), 16)
    bench.settle()
    assert ready(reader)[-1] == ((16,), [6], False)


def test_a_late_open_also_learns_that_the_lease_comes_again(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    ticket = growing(owner)
    owner.feed(ev.End(1, "preempted", again=True))
    number = follow(reader, ticket)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, LeaseExpired)
    assert end.error.again


def test_a_read_that_the_transport_refuses_waits_for_the_owners_word(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    grow(owner, (4,), 16)
    bench.settle()
    reader.feed(ev.Append(number, (plan((4,), (7,)),), False))
    for _ in range(3):
        reader.complete("not_granted")
        assert not reader.take(ev.PostRead), "it is posted again only after OPENED"
        bench.settle()
    reader.complete("not_granted")
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, LeaseExpired)
    assert "the owner's transport refused" in str(end.error)


def test_a_lease_that_does_not_grow_cannot_be_followed(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, owner.grant())
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, RemoteProtocolError)
    assert "cannot be followed" in str(end.error)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": (16, 16), "first": (0, 0), "blocks": (b"", b"")},
        {"tokens": (16,), "first": (0,), "blocks": (b"123",)},
        {"tokens": (16,), "first": (0, 0), "blocks": (b"",)},
        {"tokens": (), "first": (), "blocks": ()},
    ],
    ids=["other groups", "torn ids", "uneven", "nothing"],
)
def test_a_ready_that_makes_no_sense_ends_the_transfer(bench: Bench, fields: dict[str, Any]) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    bench.settle()
    told = m.Ready(
        src=owner.incarnation, dst=reader.incarnation, transfer=number, lease=1, epoch=1, complete=False, **fields
    )
    reader.feed(ev.Received(owner.address, m.encode(told)))
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, RemoteProtocolError)


def test_an_owner_cannot_name_blocks_without_end(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    bench.settle()
    ids, frame_blocks = b"\0" * 4, MAX_BLOCKS // 2 + 1
    for turn in range(2):
        told = m.Ready(
            src=owner.incarnation, dst=reader.incarnation, transfer=number, lease=1, epoch=1, complete=False,
            tokens=(16 * (turn + 1),), first=(turn * frame_blocks,), blocks=(ids * frame_blocks,),
        )  # fmt: skip
        reader.feed(ev.Received(owner.address, m.encode(told)))
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, RemoteProtocolError)


def test_another_epochs_ready_is_late(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner))
    bench.settle()
    told = m.Ready(
        src=owner.incarnation, dst=reader.incarnation, transfer=number, lease=1, epoch=2, complete=False,
        tokens=(16,), first=(0,), blocks=(b"\1\0\0\0",),
    )  # fmt: skip
    reader.feed(ev.Received(owner.address, m.encode(told)))
    assert ready(reader) == []
    assert reader.core.counters["late_events"] == 1


def test_blocks_that_come_before_their_tokens_are_not_lost(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    follow(reader, growing(owner))
    bench.settle()
    for blocks, tokens in (((4, 9), 0), ((4, 9, 5), 16), ((4, 9, 5, 7), 16), ((4, 9, 5, 7), 64)):
        grow(owner, blocks, tokens)
        bench.settle()
    assert [block for _, blocks, _ in ready(reader) for block in blocks] == [4, 9, 5, 7]


def test_what_an_owner_says_is_no_progress_by_itself(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = follow(reader, growing(owner, cap_seconds=600.0), timeout=3.0)
    for step in range(1, 5):
        bench.wait(1.0)
        grow(owner, (1,), step)
        bench.settle()
    assert reader.outcome(number) is not None


def test_an_epoch_that_was_to_come_and_will_not(bench: Bench) -> None:
    """Preempted, then aborted: whoever waits for the next epoch is told, at once or when it asks again."""
    owner, reader = bench.agent("p"), bench.agent("d")
    growing(owner)
    owner.feed(ev.End(1, "preempted", again=True))
    waits = follow(reader, owner.ticket(1, 2, blocks=((),)))
    bench.settle()
    owner.feed(ev.End(1, "aborted"))
    bench.settle()
    late = follow(reader, owner.ticket(1, 2, blocks=((),)))
    bench.settle()
    for number in (waits, late):
        end = reader.outcome(number)
        assert end is not None
        assert isinstance(end.error, LeaseExpired)
        assert "aborted" in str(end.error)
        assert not end.error.again


def test_a_flood_of_questions_leaves_no_timers(bench: Bench) -> None:
    owner = bench.agent("p", Limits(max_parked=8))
    for n in range(500):
        owner.feed(ev.Received("<d", m.encode(m.Await(src=5, dst=0, capability=n.to_bytes(16, "big")))))
    assert len(owner.core._context.timers) == 8
    assert len(owner.core.owner.promises._routes) == 8
    bench.wait(6.0)
    assert owner.idle()
    assert not owner.core.owner.promises._routes


def test_a_lease_only_grows(bench: Bench) -> None:
    owner = bench.agent("p")
    growing(owner)
    grow(owner, (4, 9), 32)
    for blocks, tokens in (((4,), 32), ((4, 9), 16), ((9, 4, 5), 48)):
        with pytest.raises(LocalProtocolError, match="only added"):
            grow(owner, blocks, tokens)
    grow(owner, (4, 9), 32, complete=True)
    with pytest.raises(LocalProtocolError, match="does not grow"):
        grow(owner, (4, 9, 5), 48)
    owner.grant(2)
    with pytest.raises(LocalProtocolError, match="does not grow"):
        grow(owner, (1, 2, 3, 4, 5), 64, number=2)


def test_a_complete_lease_serves_tickets_too_but_only_right_ones(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    growing(owner)
    grow(owner, (1, 2), 32, complete=True)
    ticket = owner.ticket(blocks=((1, 2),))
    wrong = reader.pull(ticket, terms=b"others")
    bench.settle()
    reader.cancelled()
    bench.settle()
    end = reader.outcome(wrong)
    assert end is not None
    assert isinstance(end.error, LeaseExpired)
    assert owner.lease_ends == [(1, 1, "released by d")]
    growing(owner, 2)
    grow(owner, (1, 2), 32, complete=True, number=2)
    right = reader.pull(owner.ticket(2, blocks=((1, 2),)), terms=b"terms")
    bench.settle()
    reader.complete()
    bench.settle()
    end = reader.outcome(right)
    assert end is not None
    assert end.outcome == "done"


# --- awaiting ---------------------------------------------------------------------------------------------------------


def expect(reader: Agent, owner: Agent, seconds: float = 20.0) -> None:
    reader.feed(ev.Expect(owner.address, CAPABILITY, seconds))


def test_the_lease_is_told_of_when_it_is_granted(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    expect(reader, owner)
    bench.wait(7.0)
    assert reader.noted(ev.Promised) == []
    ticket = growing(owner, 3)
    bench.settle()
    assert reader.noted(ev.Promised) == [ev.Promised(owner.address, CAPABILITY, ticket)]
    expect(reader, owner)
    bench.settle()
    assert len(reader.noted(ev.Promised)) == 2, "also when it is granted already"
    owner.feed(ev.End(3, "done with it"))
    bench.wait(10.0)
    assert reader.idle()
    assert owner.idle()


def test_waiting_has_an_end(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    expect(reader, owner, 3.0)
    bench.wait(3.5)
    (note,) = reader.noted(ev.Promised)
    assert note.ticket is None
    assert "no lease within 3 s" in note.reason
    bench.wait(10.0)
    assert owner.idle()


def test_a_lease_that_is_over_is_not_waited_for(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    growing(owner)
    owner.feed(ev.End(1, "aborted by its client"))
    expect(reader, owner)
    bench.settle()
    (note,) = reader.noted(ev.Promised)
    assert (note.ticket, note.reason) == (None, "aborted by its client")


def test_a_preempted_one_is_waited_for(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    growing(owner)
    owner.feed(ev.End(1, "preempted", again=True))
    expect(reader, owner)
    bench.settle()
    assert reader.noted(ev.Promised) == []
    ticket = growing(owner, 1, 2)
    bench.settle()
    assert reader.noted(ev.Promised) == [ev.Promised(owner.address, CAPABILITY, ticket)]


def test_a_broken_connection_ends_the_wait(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    expect(reader, owner)
    reader.feed(ev.Disconnected(owner.address, "gone"))
    (note,) = reader.noted(ev.Promised)
    assert "gone" in note.reason


@pytest.mark.parametrize("before", [True, False])
def test_a_renounced_lease_ends_or_never_begins(bench: Bench, before: bool) -> None:
    owner, reader, router = bench.agent("p"), bench.agent("d"), bench.agent("r", layout=None)
    expect(reader, owner)
    if not before:
        growing(owner)
    router.feed(ev.Disclaim(owner.address, CAPABILITY, True))
    bench.settle()
    if before:
        (note,) = reader.noted(ev.Promised)
        assert note.ticket is None
        growing(owner)
    assert owner.lease_ends == [(1, 1, "released by whoever brokers the hand-over")]
    bench.wait(10.0)
    assert owner.idle()


def test_a_disclaimed_answer_is_late(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    expect(reader, owner)
    bench.settle()
    reader.feed(ev.Disclaim(owner.address, CAPABILITY, False))
    growing(owner)
    bench.settle()
    assert reader.noted(ev.Promised) == []
    assert reader.core.counters["late_events"] == 1


def test_an_answer_from_elsewhere_counts_for_nothing(bench: Bench) -> None:
    owner, reader, stranger = bench.agent("p"), bench.agent("d"), bench.agent("x")
    expect(reader, owner)
    granted = m.Granted(src=stranger.incarnation, dst=reader.incarnation, capability=CAPABILITY, held=True, lease=1)
    reader.feed(ev.Received(stranger.address, m.encode(granted)))
    assert reader.noted(ev.Promised) == []


def test_what_is_waited_for_and_remembered_is_bounded(bench: Bench) -> None:
    limits = Limits(max_parked=8, max_remembered=4, max_leases=3)
    owner, reader = bench.agent("p", limits), bench.agent("d", limits)
    for n in range(50):
        capability = n.to_bytes(16, "big")
        for message in (m.Await, m.Renounce):
            frame = m.encode(message(src=reader.incarnation, dst=0, capability=capability))
            owner.feed(ev.Received("<d", frame))
        reader.feed(ev.Expect("at-nobody", capability, 5.0))
    assert len(owner.core.owner.promises._waiting) <= 8
    assert len(owner.core.owner.promises._over) <= 5
    assert reader.core.gauges()["leases_expected"] == 3
    assert len(reader.noted(ev.Promised)) == 47
