"""A pull from its start to its end, as the reader's commands and messages show it."""

from __future__ import annotations

import pytest

from pd_connector.errors import LeaseExpired, LocalProtocolError, PeerLost, RemoteProtocolError, TransferFailed
from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits
from pd_connector.protocol.transfer import TransferState

from .bench import Agent, Bench, plan, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def ended(agent: Agent, number: int) -> ev.TransferEnded:
    end = agent.outcome(number)
    assert end is not None, "the transfer has not ended"
    return end


# --- the good case ----------------------------------------------------------------------------------------------------


def test_the_first_pull(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = reader.pull(owner.grant())
    bench.settle()
    assert reader.core.gauges()["transfers_active"] == 1
    (read,) = [command for command in reader.commands if isinstance(command, ev.PostRead)]
    assert (read.number, read.epoch, read.capability) == (1, 1, bytes(range(16)))
    assert read.plan.num_blocks == 2
    reader.complete()
    bench.settle()
    end = ended(reader, number)
    assert (end.outcome, end.error, end.failed_blocks) == ("done", None, ())
    assert (end.stats.bytes, end.stats.transport) == (256, "t")
    assert [type(message).__name__ for message in reader.sent] == ["Hello", "Open", "Commit"]
    assert [type(message).__name__ for message in owner.sent] == ["Welcome", "Opened", "Verdict"]
    assert owner.lease_ends == [(1, 1, "every reader has its blocks")]
    assert reader.idle()
    assert owner.idle()


def test_later_pulls_cost_one_read_and_one_commit(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    for lease in range(2, 5):
        reader.pull(owner.grant(lease))
        bench.settle()
        assert len(reader.complete()) == 1
        bench.settle()
    assert [type(message).__name__ for message in reader.sent] == ["Open", "Commit"] * 3
    assert reader.core.counters["transfers_done"] == 4


def test_stats_name_the_stages(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = reader.pull(owner.grant())
    bench.now += 1.0
    bench.settle()
    bench.now += 2.0
    reader.complete()
    bench.now += 3.0
    bench.settle()
    stats = ended(reader, number).stats
    assert (stats.connect, stats.wire, stats.commit) == pytest.approx((1.0, 2.0, 3.0))


def test_parts_are_read_in_a_window_and_confirmed_one_by_one(bench: Bench) -> None:
    owner, reader = ready_pair(bench, window=2)
    parts = [plan(grids=(grid,)) for grid in (0, 1, 0)]
    number = reader.pull(owner.grant(2), *parts)
    bench.settle()
    posted = [command for command in reader.commands if isinstance(command, ev.PostRead)]
    assert [read.plan is part for read, part in zip(posted, parts, strict=False)] == [True, True]
    reader.complete(count=1)
    bench.settle()
    assert reader.noted(ev.PartConfirmed) == [ev.PartConfirmed(number, 0)]
    reader.complete()
    bench.settle()
    assert reader.noted(ev.PartConfirmed) == [ev.PartConfirmed(number, n) for n in range(3)]
    assert [(c.part, c.final) for c in reader.said(m.Commit)] == [(0, False), (1, False), (2, True)]
    assert ended(reader, number).outcome == "done"


def test_the_last_part_waits_for_the_others_to_be_confirmed(bench: Bench) -> None:
    owner, reader = ready_pair(bench, window=2)
    reader.pull(owner.grant(2), plan(), plan())
    bench.settle()
    first, second = reader.take(ev.PostRead)
    reader.feed(ev.Completed(second.tag, "done"))
    bench.settle()
    assert not reader.said(m.Commit)
    reader.feed(ev.Completed(first.tag, "done"))
    assert [c.part for c in reader.said(m.Commit)] == [0], "the last one is asked for when the first is confirmed"
    bench.settle()
    assert [c.part for c in reader.said(m.Commit)] == [0, 1]


def test_parts_without_blocks_need_no_read(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2), plan((), ()), plan(), plan((), ()))
    bench.settle()
    assert len(reader.complete()) == 1
    bench.settle()
    assert [part.part for part in reader.noted(ev.PartConfirmed)] == [0, 1, 2]
    assert ended(reader, number).outcome == "done"


def test_a_pull_of_nothing_still_commits(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2), plan((), ()))
    bench.settle()
    assert not reader.take(ev.PostRead)
    assert ended(reader, number).outcome == "done"
    assert owner.lease_ends[-1][0] == 2


def test_the_lease_is_renewed_while_a_read_takes_long(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2, seconds=1.0, cap_seconds=60.0), timeout=30.0)
    bench.settle()
    bench.wait(10.0)
    reader.complete()
    bench.settle()
    assert ended(reader, number).outcome == "done"


def test_a_lease_is_not_renewed_past_its_cap(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2, seconds=1.0, cap_seconds=3.0), timeout=30.0)
    bench.settle()
    bench.wait(4.0)
    assert owner.lease_ends == [(2, 1, "it expired")]
    reader.complete()
    bench.settle()
    assert isinstance(ended(reader, number).error, LeaseExpired)


# --- lost and repeated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [m.Hello, m.Welcome, m.Open, m.Opened, m.Commit, m.Verdict])
def test_a_lost_message_is_repeated(bench: Bench, kind: type[m.Message]) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    bench.drop = (kind,)
    number = reader.pull(owner.grant())
    bench.settle()
    reader.complete()
    bench.settle()
    bench.drop = ()
    bench.wait(0.6)
    reader.complete()
    bench.settle()
    assert ended(reader, number).outcome == "done"
    assert len(owner.lease_ends) == 1


def test_late_and_repeated_events_are_counted_not_raised(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    (tag,) = reader.complete()
    reader.feed(ev.Completed(tag, "done"))
    bench.settle()
    (verdict,) = owner.said(m.Verdict)
    before = reader.core.counters["late_events"]
    for event in (
        ev.Completed(tag, "cancelled"),
        ev.Completed(99_999, "done"),
        ev.Received(owner.address, m.encode(verdict)),
        ev.Abort(number),
        ev.Abort(99_999),
        ev.Digested(99_999, b""),
        ev.Connected("nobody"),
        ev.End(99_999, "never granted"),
    ):
        reader.feed(event)
    assert reader.core.counters["late_events"] == before + 8
    assert ended(reader, number).outcome == "done"


# --- the owner's transport does not know the lease yet ----------------------------------------------------------------


def test_a_read_refused_before_opened_is_posted_again_after_it(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.ticket(2))
    bench.settle()
    reader.complete("not_granted")
    assert not reader.take(ev.PostRead), "parked until OPENED says that the lease is known"
    owner.grant(2)
    bench.settle()
    reader.complete()
    bench.settle()
    assert ended(reader, number).outcome == "done"


def test_a_read_refused_after_opened_is_posted_again_at_once(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.ticket(2))
    bench.settle()
    owner.grant(2)
    bench.settle()
    reader.complete("not_granted")
    reader.complete()
    bench.settle()
    assert ended(reader, number).outcome == "done"


def test_a_read_is_posted_again_only_once(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    reader.complete("not_granted")
    reader.complete("not_granted")
    assert isinstance(ended(reader, number).error, LeaseExpired)


# --- giving up --------------------------------------------------------------------------------------------------------


def connecting(bench: Bench, owner: Agent, reader: Agent) -> int:
    bench.connects = False
    reader = bench.agents["at-d"]
    reader.feed(ev.Disconnected(owner.address, "so that it has to connect again"))
    number = reader.pull(owner.grant(2))
    bench.settle()
    return number


def reading(bench: Bench, owner: Agent, reader: Agent) -> int:
    number = reader.pull(owner.grant(2))
    bench.settle()
    return number


def confirming(bench: Bench, owner: Agent, reader: Agent) -> int:
    bench.drop = (m.Commit,)
    number = reader.pull(owner.grant(2))
    bench.settle()
    reader.complete()
    bench.settle()
    return number


STAGES = {
    TransferState.CONNECTING: connecting,
    TransferState.READING: reading,
    TransferState.CONFIRMING: confirming,
}


@pytest.mark.parametrize("state", STAGES)
@pytest.mark.parametrize("how", ["abort", "deadline", "disconnect", "close"])
def test_giving_up_in_every_state(bench: Bench, state: TransferState, how: str) -> None:
    owner, reader = ready_pair(bench)
    number = STAGES[state](bench, owner, reader)
    assert reader.core.reader.transfers[number].state is state
    match how:
        case "abort":
            reader.feed(ev.Abort(number, "the client left"))
        case "deadline":
            bench.stop_the_clock_for(20.1)
            reader.feed(ev.Tick())
        case "disconnect":
            reader.feed(ev.Disconnected(owner.address, "cable"))
        case "close":
            reader.feed(ev.Close())
    if state is TransferState.READING:
        assert reader.outcome(number) is None, "its read may still write"
        assert reader.core.gauges()["transfers_quarantined"] == 1
        assert len(reader.cancelled()) == 1
    end = ended(reader, number)
    assert end.outcome == ("aborted" if how in ("abort", "close") else "failed")
    assert end.failed_blocks == (7, 8)
    expected = {"abort": TransferFailed, "deadline": PeerLost, "disconnect": PeerLost, "close": TransferFailed}
    assert isinstance(end.error, expected[how])
    assert len(reader.said(m.Release)) == 1
    bench.drop = ()
    bench.wait(61.0)
    assert reader.idle()
    assert owner.idle()
    assert len(owner.lease_ends) == 1


def test_a_second_reason_to_give_up_changes_nothing(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    reader.feed(ev.Abort(number, "first"))
    reader.feed(ev.Abort(number, "second"))
    reader.feed(ev.Disconnected(owner.address, "third"))
    reader.cancelled()
    end = ended(reader, number)
    assert end.outcome == "aborted"
    assert "first" in str(end.error)


@pytest.mark.parametrize("status", ["error", "cancelled", "peer_lost"])
def test_a_read_that_fails(bench: Bench, status: str) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2), plan(), plan(target=(8, 9)))
    bench.settle()
    reader.complete(status, count=1)
    assert reader.outcome(number) is None, "the other part may still write"
    reader.cancelled()
    end = ended(reader, number)
    assert end.failed_blocks == (7, 8, 9)
    assert isinstance(end.error, PeerLost if status == "peer_lost" else TransferFailed)
    assert (not reader.core.reader.dialer.sessions) == (status == "peer_lost")


def test_a_cancelled_read_may_end_in_any_way(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    reader.feed(ev.Abort(number))
    reader.complete("done")
    assert ended(reader, number).outcome == "aborted"


def test_settle_then_fence_then_unsettled(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    reader.feed(ev.Abort(number))
    bench.wait(2.1)
    assert len([command for command in reader.commands if isinstance(command, ev.Fence)]) == 1
    bench.wait(10.1)
    assert reader.core.counters["fences_timed_out"] == 1
    assert reader.core.gauges()["transfers_quarantined"] == 1, "leak, never corrupt"
    other = reader.pull(owner.grant(3))
    bench.settle()
    assert "never settled" in str(ended(reader, other).error)
    (tag,) = [command.tag for command in reader.take(ev.PostRead)]
    reader.feed(ev.Completed(tag, "cancelled"))
    assert ended(reader, number).outcome == "aborted"


def test_not_held_is_never_done(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    owner.feed(ev.End(2, "preempted"))
    reader.complete()
    bench.settle()
    end = ended(reader, number)
    assert isinstance(end.error, LeaseExpired)
    assert "preempted" in str(end.error)
    assert reader.core.counters["verdicts_not_held"] == 1


def test_a_verdict_for_a_part_that_was_not_asked_is_late(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2), plan(), plan())
    bench.settle()
    for part in (0, 1, 2, 99):
        lie = m.Verdict(src=owner.incarnation, dst=reader.incarnation, transfer=number, part=part, held=True)
        reader.feed(ev.Received(owner.address, m.encode(lie)))
    assert not reader.noted(ev.PartConfirmed)
    assert reader.outcome(number) is None


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_bounds_of_pulls(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d", Limits(max_transfers=1))
    ticket = owner.grant()
    with pytest.raises(LocalProtocolError, match="part"):
        reader.feed(ev.Pull(1, ticket, (), 1.0))
    with pytest.raises(LocalProtocolError, match="timeout"):
        reader.feed(ev.Pull(1, ticket, ((plan(),),), 0.0))
    number = reader.pull(ticket)
    with pytest.raises(LocalProtocolError, match="running already"):
        reader.feed(ev.Pull(number, ticket, ((plan(),),), 1.0))
    with pytest.raises(LocalProtocolError, match="limit"):
        reader.pull(ticket)


def test_transfers_per_peer_queue(bench: Bench) -> None:
    owner, reader = ready_pair(bench, max_transfers_per_peer=2)
    numbers = [reader.pull(owner.grant(lease)) for lease in range(2, 6)]
    bench.settle()
    gauges = reader.core.gauges()
    assert (gauges["transfers_active"], gauges["transfers_waiting"]) == (2, 2)
    while reader.complete(count=1):
        bench.settle()
    assert [ended(reader, number).outcome for number in numbers] == ["done"] * 4


def test_too_many_peers_in_use(bench: Bench) -> None:
    reader = bench.agent("d", Limits(max_sessions=1))
    reader.pull(bench.agent("p").grant())
    number = reader.pull(bench.agent("q").grant())
    assert isinstance(ended(reader, number).error, LocalProtocolError)


def test_refused_by_a_bound_of_the_owner(bench: Bench) -> None:
    owner, reader = bench.agent("p", Limits(max_parked=0)), bench.agent("d")
    number = reader.pull(owner.ticket(5))
    bench.settle()
    reader.cancelled()
    end = ended(reader, number)
    assert isinstance(end.error, RemoteProtocolError)
    assert "max_parked" in str(end.error)


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_drain(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    for agent in (owner, reader):
        agent.feed(ev.Drain())
        assert not agent.noted(ev.Drained)
    with pytest.raises(LocalProtocolError, match="draining"):
        reader.pull(owner.ticket(2))
    with pytest.raises(LocalProtocolError, match="draining"):
        owner.grant(3)
    reader.complete()
    bench.settle()
    assert ended(reader, number).outcome == "done"
    bench.wait(1.0)
    for agent in (owner, reader):
        agent.feed(ev.Drain())
        assert len(agent.noted(ev.Drained)) == 1


def test_close(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reading(bench, owner, reader)
    owner.feed(ev.Close())
    assert owner.lease_ends == [(2, 1, "the owner closed")]
    assert owner.noted(ev.Drained)
    bench.settle()
    reader.cancelled()
    assert isinstance(ended(reader, number).error, PeerLost)
    assert "closed" in str(ended(reader, number).error)
    reader.feed(ev.Close())
    assert reader.noted(ev.Drained)
    assert reader.idle()
