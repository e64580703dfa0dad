"""Mistakes that were in the core once, each with the shortest story that shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pd_connector.errors import LayoutMismatch, LocalProtocolError, PeerLost
from pd_connector.plan import CopyPlan
from pd_connector.protocol.context import Limits
from pd_connector.protocol.events import Abort, Completed, End, Extend, Fence, Keep, LeaseEnded, Pull, Received, Tick
from pd_connector.protocol.messages import Commit, Endpoint, Renewed, Stale, Verdict, encode
from pd_connector.protocol.timers import Timers

from .bench import Agent, Bench, layout, plan, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_setting_a_deadline_to_the_same_time_keeps_the_heap_small() -> None:
    timers = Timers()
    for _ in range(10_000):
        timers.set("lease", 5.0)
    assert len(timers._heap) == 1
    assert list(timers.due(5.0)) == ["lease"]


def test_renewals_at_the_cap_leave_no_trace(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(seconds=60.0, cap_seconds=60.0)
    for _ in range(1000):
        owner.feed(Extend(1))
    assert len(owner.core._context.timers._heap) == 1


def test_an_aborted_transfer_leaves_the_queue_of_its_session(bench: Bench) -> None:
    owner, reader = ready_pair(bench, max_transfers_per_peer=1)
    owner.grant(2)
    reader.pull(owner.ticket(2))
    for _ in range(100):
        reader.feed(Abort(reader.pull(owner.ticket(2))))
    (session,) = reader.core.reader.dialer.sessions.values()
    assert not session.waiting


def test_an_unused_session_makes_room_for_a_new_peer(bench: Bench) -> None:
    reader = bench.agent("d", Limits(max_sessions=2))
    for n in range(5):
        owner = bench.agent(f"p{n}")
        number = reader.pull(owner.grant())
        bench.settle()
        reader.complete()
        bench.settle()
        end = reader.outcome(number)
        assert end is not None
        assert end.outcome == "done"
    assert len(reader.core.reader.dialer.sessions) == 2


def test_a_directory_that_names_itself_is_refused(bench: Bench) -> None:
    speaker = bench.agent("s", layout=None, transports={})
    myself = (Endpoint(0, speaker.address, speaker.incarnation, layout()),)
    speaker.core.identity = replace(speaker.core.identity, directory=myself)
    reader = bench.agent("d")
    number = reader.pull(speaker.ticket())
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, LayoutMismatch)


def stuck(bench: Bench, owner: Agent, reader: Agent, lease: int) -> int:
    """A pull whose read was posted, was given up, and never answers its cancel."""
    number = reader.pull(owner.grant(lease))
    bench.settle()
    reader.feed(Abort(number))
    return number


def test_a_fence_ends_the_quarantine_of_reads_whose_completion_got_lost(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = stuck(bench, owner, reader, 2)
    bench.wait(2.1)
    assert reader.outcome(number) is None
    reader.fenced()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "aborted"
    bench.wait(61)
    assert reader.idle()


def test_a_read_posted_after_a_fence_gets_another_one(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    stuck(bench, owner, reader, 2)
    bench.wait(2.1)
    (first,) = reader.take(Fence)
    second = stuck(bench, owner, reader, 3)
    bench.wait(2.1)  # its settle timer finds the first fence under way
    assert not reader.take(Fence)
    reader.feed(Completed(first.tag, "done"))
    assert reader.outcome(second) is None, "the first fence says nothing of a read that was posted after it"
    bench.wait(2.1)
    reader.fenced()
    assert reader.outcome(second) is not None


def test_a_fence_that_fails_is_no_fence(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = stuck(bench, owner, reader, 2)
    bench.wait(2.1)
    reader.fenced("error")
    assert reader.outcome(number) is None
    assert reader.core.gauges()["transfers_quarantined"] == 1
    bench.wait(10.1)
    reader.fenced()
    assert reader.outcome(number) is not None


def test_a_fence_that_times_out_ends_the_session_that_is_there(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    stuck(bench, owner, reader, 2)
    bench.wait(2.0 + 10.1)
    (fence,) = reader.take(Fence)
    number = reader.pull(owner.grant(3))
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert isinstance(end.error, PeerLost)
    assert "settled" in str(end.error)
    reader.feed(Completed(fence.tag, "done"))
    number = reader.pull(owner.grant(4))
    bench.settle()
    reader.complete()
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"


def test_nobody_answers_in_the_name_of_the_owner(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    reader.complete()
    forged = Verdict(src=owner.incarnation, dst=reader.incarnation, transfer=number, part=0, held=True)
    reader.feed(Received("at-somebody-else", encode(forged)))
    assert reader.outcome(number) is None
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"


def test_nobody_loses_a_kept_ticket_in_the_name_of_the_owner(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    reader.feed(Keep(owner.grant(), 20.0))
    me = owner.incarnation
    for lie in (
        Stale(src=1, dst=reader.incarnation, incarnation=me),
        Renewed(src=me, dst=reader.incarnation, lease=1, epoch=1, held=False),
    ):
        reader.feed(Received("at-somebody-else", encode(lie)))
    assert reader.core.gauges()["tickets_kept"] == 1


def test_two_addresses_that_claim_the_same_name_and_incarnation_are_two_peers(bench: Bench) -> None:
    bench.connects = False
    owner, reader = bench.agent("p"), bench.agent("d")
    impostor = bench.agent("q", agent="p", incarnation=owner.incarnation)
    for agent in (owner, impostor):
        reader.pull(agent.ticket())
    bench.settle()
    sessions = reader.core.reader.dialer.sessions.values()
    assert len({session.peer for session in sessions}) == 2


def test_what_was_due_is_not_lost_when_a_local_call_is_refused(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(seconds=1.0)
    bench.stop_the_clock_for(2.0)
    with pytest.raises(LocalProtocolError):
        owner.feed(Pull(1, owner.ticket(), (), 1.0))
    deadline = owner.core.next_deadline()
    assert deadline is not None
    assert deadline <= bench.now
    owner.feed(Tick())
    assert len(owner.noted(LeaseEnded)) == 1
    assert owner.core.next_deadline() is None


def test_ended_leases_do_not_keep_their_blocks(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(blocks={0: tuple(range(1000))})
    owner.feed(End(1, "because"))
    assert owner.core.owner.table._ended[1][1] == (1, "because", False)


def test_a_long_reason_still_reaches_the_reader(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    owner.feed(End(2, "x" * 10_000))
    reader.complete()
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert "xxx" in str(end.error)


def test_an_audit_that_cannot_be_sent_is_refused_at_once(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    ids = range(300_000)
    big: CopyPlan = plan(ids, ids)
    with pytest.raises(LocalProtocolError, match="audit"):
        reader.pull(owner.ticket(), big, audit=True)
    reader.pull(owner.ticket(), big)
    assert not owner.said(Commit)
