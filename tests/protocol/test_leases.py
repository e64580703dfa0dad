"""The owner: leases, verdicts, requests that come too early or from the wrong one."""

from __future__ import annotations

import pytest

from pd_connector.errors import LocalProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits

from .bench import CAPABILITY, Agent, Bench, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def ask(bench: Bench, owner: Agent, message: m.Message) -> list[m.Message]:
    """What the owner answers at once."""
    before = len(owner.sent)
    owner.feed(ev.Received("<d", m.encode(message)))
    return owner.sent[before:]


def commit(owner: Agent, transfer: int = 1, **fields: object) -> m.Commit:
    base = m.Commit(
        src=77,
        dst=owner.incarnation,
        transfer=transfer,
        part=0,
        lease=1,
        epoch=1,
        capability=CAPABILITY,
        reader="d",
        final=True,
    )
    return m.Commit(**{**{name: getattr(base, name) for name in base.__struct_fields__}, **fields})


def test_a_ticket_with_other_terms_is_told_not_held_and_the_lease_goes_on(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(terms=b"as given out")
    for _ in range(2):
        forged = verdict(bench, owner, commit(owner, terms=b"forged"))
        assert not forged.held
        assert "was changed on its way" in forged.reason
    opened = m.Open(
        src=77, dst=owner.incarnation, transfer=2, lease=1, epoch=1, capability=CAPABILITY, reader="d", transport="t"
    )
    (answer,) = ask(bench, owner, opened)
    assert isinstance(answer, m.Opened)
    assert not answer.held
    assert owner.lease_ends == []
    assert verdict(bench, owner, commit(owner, terms=b"as given out")).held
    assert not verdict(bench, owner, commit(owner, terms=b"forged")).held  # the answer to another question


def verdict(bench: Bench, owner: Agent, message: m.Commit) -> m.Verdict:
    (answer,) = ask(bench, owner, message)
    assert isinstance(answer, m.Verdict)
    return answer


# --- granting ---------------------------------------------------------------------------------------------------------


def test_the_order_of_a_lease(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(blocks={0: (1, 2), 1: (5,)})
    assert owner.core.gauges()["leases"] == 1
    assert owner.core.gauges()["leased_blocks"] == 3
    owner.feed(ev.End(1, "because"))
    kinds = [type(command).__name__ for command in owner.commands]
    assert kinds == ["GrantBlocks", "RevokeBlocks", "Notify"], "no transport serves it any more when the engine hears"
    assert owner.lease_ends == [(1, 1, "because")]
    owner.feed(ev.End(1, "again"))
    assert len(owner.lease_ends) == 1
    assert owner.idle()


@pytest.mark.parametrize("fields", [{"readers": 0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_a_lease_for_nobody_or_no_time(bench: Bench, fields: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        bench.agent("p").grant(**fields)


def test_a_lease_is_granted_once_per_epoch(bench: Bench) -> None:
    owner = bench.agent("p", Limits(max_leases=2))
    owner.grant(1, epoch=2)
    with pytest.raises(LocalProtocolError, match="held already"):
        owner.grant(1, epoch=3)
    owner.feed(ev.End(1, "preempted"))
    for epoch in (1, 2):
        with pytest.raises(LocalProtocolError, match="higher"):
            owner.grant(1, epoch=epoch)
    owner.grant(1, epoch=3)
    owner.grant(2)
    with pytest.raises(LocalProtocolError, match="max_leases"):
        owner.grant(3)


def test_expiry(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(seconds=1.0)
    bench.wait(0.95)
    assert not owner.lease_ends
    bench.wait(0.1)
    assert owner.lease_ends == [(1, 1, "it expired")]
    assert owner.core.counters["leases_expired"] == 1


def test_extending_up_to_the_cap(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(seconds=1.0, cap_seconds=2.0)
    for _ in range(5):
        owner.feed(ev.Extend(1))
        bench.wait(0.39)
    assert not owner.lease_ends
    bench.wait(0.1)
    owner.feed(ev.Extend(1))
    assert len(owner.lease_ends) == 1


# --- COMMIT -----------------------------------------------------------------------------------------------------------


def test_commit_is_idempotent(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant()
    first = verdict(bench, owner, commit(owner))
    assert first.held
    assert owner.lease_ends
    assert verdict(bench, owner, commit(owner)) == first
    assert owner.core.counters["commits_repeated"] == 1
    assert len(owner.lease_ends) == 1


def test_a_forgotten_verdict_is_not_held(bench: Bench) -> None:
    owner = bench.agent("p", Limits(max_remembered=1))
    for lease in (1, 2):
        owner.grant(lease)
        assert verdict(bench, owner, commit(owner, transfer=lease, lease=lease)).held
    assert not verdict(bench, owner, commit(owner, transfer=1, lease=1)).held
    assert verdict(bench, owner, commit(owner, transfer=2, lease=2)).held


def test_verdicts_are_forgotten_with_time(bench: Bench) -> None:
    owner = bench.agent("p", Limits(remember=10.0))
    owner.grant(1)
    assert verdict(bench, owner, commit(owner)).held
    bench.wait(11.0, step=1.0)
    owner.grant(2)
    assert verdict(bench, owner, commit(owner, transfer=2, lease=2)).held
    assert not verdict(bench, owner, commit(owner)).held
    assert len(owner.core.owner.table._answers) == 1


def test_a_process_that_was_stopped_past_the_lease_says_not_held(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2, seconds=1.0))
    bench.settle()
    reader.complete()
    bench.stop_the_clock_for(1.5)
    bench.settle()  # the COMMIT is handled before any timer had a chance
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "failed"
    assert "expired" in str(end.error)


def test_a_check_does_not_release(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant()
    assert verdict(bench, owner, commit(owner, final=False)).held
    assert not owner.lease_ends
    assert verdict(bench, owner, commit(owner, part=1)).held
    assert owner.lease_ends


def test_a_verdict_belongs_to_the_incarnation_that_asked(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant()
    assert verdict(bench, owner, commit(owner, src=77)).held
    assert not verdict(bench, owner, commit(owner, src=78)).held, "transfer 1 of another incarnation is another"


@pytest.mark.parametrize(
    "change",
    [
        {"capability": bytes(16)},
        {"epoch": 0},
        {"lease": 0},
    ],
)
def test_a_stale_or_forged_commit_is_not_held(bench: Bench, change: dict[str, object]) -> None:
    owner = bench.agent("p")
    owner.grant(1)
    owner.grant(2)
    assert not verdict(bench, owner, commit(owner, **change)).held
    assert not owner.lease_ends


def test_an_old_epoch_is_over_and_the_next_one_is_not(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(1, epoch=1)
    owner.feed(ev.End(1, "preempted"))
    owner.grant(1, epoch=2)
    assert not verdict(bench, owner, commit(owner, transfer=1, epoch=1)).held
    assert verdict(bench, owner, commit(owner, transfer=2, epoch=2)).held


def test_another_incarnation_is_stale(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant()
    me = owner.incarnation
    lease = {"lease": 1, "epoch": 1, "capability": CAPABILITY}
    for message in (
        commit(owner, dst=me + 1),
        m.Open(src=77, dst=me + 1, transfer=1, reader="d", transport="t", **lease),
        m.Renew(src=77, dst=me + 1, **lease),
        m.Release(src=77, dst=me + 1, **lease),
    ):
        assert ask(bench, owner, message) == [m.Stale(src=me, dst=77, incarnation=me + 1)]
    assert ask(bench, owner, m.Bye(src=77, dst=me + 1)) == []
    assert owner.core.counters["stale_messages"] == 5
    assert not owner.lease_ends


# --- several readers, releases ----------------------------------------------------------------------------------------


def test_several_readers(bench: Bench) -> None:
    owner = bench.agent("p")
    readers = [bench.agent(name) for name in ("d", "e")]
    ticket = owner.grant(readers=2)
    numbers = [reader.pull(ticket) for reader in readers]
    bench.settle()
    readers[0].complete()
    bench.settle()
    assert not owner.lease_ends
    bench.wait(1.0)
    readers[1].complete()
    bench.settle()
    for reader, number in zip(readers, numbers, strict=True):
        end = reader.outcome(number)
        assert end is not None
        assert end.outcome == "done"
    assert owner.lease_ends == [(1, 1, "every reader has its blocks")]


def test_one_reader_counts_once(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(readers=2)
    for transfer in (1, 2):
        assert verdict(bench, owner, commit(owner, transfer=transfer)).held
    assert not owner.lease_ends
    assert verdict(bench, owner, commit(owner, transfer=3, reader="e")).held
    assert owner.lease_ends


def test_a_reader_that_gives_up_releases(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    reader.feed(ev.Abort(number))
    bench.settle()
    assert owner.lease_ends == [(2, 1, "released by d")]


@pytest.mark.parametrize(("reader", "ends"), [("", True), ("d", False)])
def test_the_broker_speaks_for_every_reader(bench: Bench, reader: str, ends: bool) -> None:
    owner, broker = bench.agent("p"), bench.agent("router", layout=None, transports={})
    broker.feed(ev.Forgo(owner.grant(readers=2), reader))
    bench.settle()
    assert bool(owner.lease_ends) == ends


def test_a_release_needs_the_capability(bench: Bench) -> None:
    owner, broker = bench.agent("p"), bench.agent("router", layout=None, transports={})
    broker.feed(ev.Forgo(replace_capability(owner.grant(1))))
    bench.settle()
    assert not owner.lease_ends


def replace_capability(ticket: object) -> object:
    return type(ticket)(**{**{n: getattr(ticket, n) for n in ticket.__struct_fields__}, "capability": bytes(16)})


# --- requests before their grant --------------------------------------------------------------------------------------


def test_a_pull_may_come_before_its_grant(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.ticket(2))
    bench.settle()
    reader.complete()
    bench.wait(1.0)
    assert reader.outcome(number) is None
    owner.grant(2)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"
    assert owner.idle()


def test_a_grant_that_never_comes(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.ticket(2))
    bench.settle()
    bench.wait(2.2)
    reader.cancelled()
    end = reader.outcome(number)
    assert end is not None
    assert "not held" in str(end.error)
    bench.wait(5.0)
    assert owner.idle()


def test_a_resumed_request_waits_for_its_epoch(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    owner.grant(2, epoch=1)
    number = reader.pull(owner.ticket(2, epoch=2))
    bench.settle()
    reader.complete()
    bench.settle()
    owner.feed(ev.End(2, "preempted"))
    owner.grant(2, epoch=2)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"


def test_parking_is_bounded(bench: Bench) -> None:
    owner = bench.agent("p", Limits(max_parked=2))
    for transfer in range(2):
        assert not ask(bench, owner, commit(owner, transfer=transfer, lease=9))
    (answer,) = ask(bench, owner, commit(owner, transfer=2, lease=9))
    assert isinstance(answer, m.Refused)
    assert answer.transfer == 2
    renew = m.Renew(src=77, dst=owner.incarnation, lease=9, epoch=1, capability=CAPABILITY)
    assert not ask(bench, owner, renew)
    assert owner.core.counters["parked_refused"] == 2
    bench.wait(2.1)
    assert len(owner.said(m.Verdict)) == 2
    assert owner.idle()


def test_a_parked_release_ends_the_lease_when_it_comes(bench: Bench) -> None:
    owner = bench.agent("p")
    ask(bench, owner, m.Release(src=7, dst=owner.incarnation, lease=1, epoch=1, capability=CAPABILITY, reader=""))
    owner.grant()
    assert len(owner.lease_ends) == 1
    assert owner.idle()


def test_closing_forgets_what_is_parked(bench: Bench) -> None:
    owner = bench.agent("p")
    ask(bench, owner, commit(owner, lease=9))
    owner.feed(ev.Close())
    bench.wait(5.0)
    assert not owner.said(m.Verdict)
    assert owner.idle()


# --- kept tickets -----------------------------------------------------------------------------------------------------


def test_a_kept_ticket_is_renewed_until_it_is_dropped(bench: Bench) -> None:
    owner, keeper = bench.agent("p"), bench.agent("d")
    ticket = owner.grant(seconds=1.0)
    keeper.feed(ev.Keep(ticket, 20.0))
    keeper.feed(ev.Keep(ticket, 20.0))
    bench.settle()
    bench.wait(5.0)
    assert not owner.lease_ends
    assert owner.noted(ev.LeaseRenewed)
    keeper.feed(ev.Drop(ticket))
    assert keeper.idle()
    bench.wait(1.1)
    assert owner.lease_ends


def test_a_ticket_is_kept_for_its_time(bench: Bench) -> None:
    owner, keeper = bench.agent("p"), bench.agent("d")
    keeper.feed(ev.Keep(owner.grant(seconds=1.0), 3.0))
    bench.settle()
    bench.wait(4.5)
    assert keeper.idle()
    assert owner.lease_ends
    assert not keeper.noted(ev.TicketLost)


def test_a_lost_ticket_is_told_once(bench: Bench) -> None:
    owner, keeper = bench.agent("p"), bench.agent("d")
    ticket = owner.grant(seconds=1.0)
    keeper.feed(ev.Keep(ticket, 20.0))
    bench.settle()
    owner.feed(ev.End(1, "preempted"))
    bench.wait(3.0)
    assert keeper.noted(ev.TicketLost) == [ev.TicketLost(ticket)]
    assert keeper.idle()


def test_a_ticket_of_a_dead_incarnation_is_lost(bench: Bench) -> None:
    owner, keeper = bench.agent("p"), bench.agent("d")
    ticket = owner.grant(seconds=1.0)
    keeper.feed(ev.Keep(ticket, 20.0))
    bench.settle()
    bench.agent("p").grant()
    bench.wait(1.0)
    assert keeper.noted(ev.TicketLost) == [ev.TicketLost(ticket)]
    assert keeper.idle()


def test_renewing_what_is_not_there(bench: Bench) -> None:
    owner = bench.agent("p")
    owner.grant(1)
    renew = m.Renew(src=7, dst=owner.incarnation, lease=1, epoch=0, capability=CAPABILITY)
    (answer,) = ask(bench, owner, renew)
    assert isinstance(answer, m.Renewed)
    assert not answer.held


def test_an_answer_about_one_lease_is_none_about_another(bench: Bench) -> None:
    """Whoever holds a live lease cannot leave a "held" behind for a transfer of somebody else."""
    owner = bench.agent("p")
    owner.grant(1)
    owner.grant(2)
    assert verdict(bench, owner, commit(owner, transfer=5, lease=1, final=False)).held
    owner.feed(ev.End(2, "preempted"))
    assert not verdict(bench, owner, commit(owner, transfer=5, lease=2)).held
    assert verdict(bench, owner, commit(owner, transfer=5, lease=1, final=False)).held
