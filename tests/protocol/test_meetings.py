"""Meetings: greeting an owner to learn its ranks. Each ends once, whatever happens, and leaves nothing."""

from __future__ import annotations

import pytest

from pd_connector.errors import LayoutMismatch, LocalProtocolError, PeerLost
from pd_connector.protocol import events as ev
from pd_connector.protocol.context import Limits
from pd_connector.protocol.ticket import Ticket

from .bench import Agent, Bench, layout, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def meet(reader: Agent, ticket: Ticket, timeout: float = 20.0) -> int:
    number = reader.core.new_id()
    reader.feed(ev.Meet(number, ticket, timeout))
    return number


def met(reader: Agent, number: int) -> ev.Met:
    (note,) = [note for note in reader.noted(ev.Met) if note.meeting == number]
    return note


def test_an_owner_with_memory_is_its_own_rank(bench: Bench) -> None:
    owner, reader = bench.agent("p", layout=layout(rank=3)), bench.agent("d")
    number = meet(reader, owner.ticket())
    assert not reader.noted(ev.Met)
    bench.settle()
    (rank,) = met(reader, number).ranks
    assert (rank.rank, rank.address, rank.incarnation, rank.layout) == (
        3,
        owner.address,
        owner.incarnation,
        layout(rank=3),
    )
    assert reader.idle()


def test_a_directory_is_told_in_order_of_ranks(bench: Bench) -> None:
    first, second = bench.agent("p0"), bench.agent("p1", layout=layout(rank=1))
    speaker, reader = bench.speaker("p", first, second), bench.agent("d")
    number = meet(reader, speaker.ticket())
    bench.settle()
    assert [(rank.rank, rank.address) for rank in met(reader, number).ranks] == [
        (0, first.address),
        (1, second.address),
    ]


def test_whoever_is_known_is_met_at_once(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    said = len(reader.sent)
    assert met(reader, meet(reader, owner.ticket())).error is None
    assert len(reader.sent) == said


def test_an_owner_without_ranks_is_asked_again_the_next_time(bench: Bench) -> None:
    speaker, reader = bench.speaker("p"), bench.agent("d")
    number = meet(reader, speaker.ticket())
    bench.settle()
    assert isinstance(met(reader, number).error, LayoutMismatch)
    assert not reader.core.reader.dialer.sessions
    assert reader.core.counters["meetings_failed"] == 1


@pytest.mark.parametrize("fields", [{"incarnation": 99}, {"address": "at-nowhere"}])
def test_nobody_is_met(bench: Bench, fields: dict[str, object]) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    number = meet(reader, owner.ticket(**fields))
    bench.wait(10.0)
    note = met(reader, number)
    assert isinstance(note.error, PeerLost)
    assert note.ranks == ()
    assert reader.idle()


def test_a_meeting_has_a_deadline_of_its_own(bench: Bench) -> None:
    reader = bench.agent("d", Limits(hello=60.0))
    number = meet(reader, bench.agent("p").ticket(address="at-nowhere"), timeout=1.0)
    bench.wait(2.0)
    assert "nobody answered in time" in str(met(reader, number).error)


def test_abort_and_close_end_it(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    first, second = meet(reader, owner.ticket()), meet(reader, owner.ticket())
    reader.feed(ev.Abort(first, "not wanted"))
    assert "not wanted" in str(met(reader, first).error)
    reader.feed(ev.Close())
    assert "this agent closed" in str(met(reader, second).error)
    bench.settle()
    assert len(reader.noted(ev.Met)) == 2


def test_bounds(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d", Limits(max_transfers=1))
    number = meet(reader, owner.ticket())
    for event in (
        ev.Meet(number, owner.ticket(), 1.0),
        ev.Meet(99, owner.ticket(), 1.0),
        ev.Meet(98, owner.ticket(), 0),
    ):
        with pytest.raises(LocalProtocolError):
            reader.feed(event)
    reader.feed(ev.Drain())
    with pytest.raises(LocalProtocolError, match="draining"):
        meet(reader, owner.ticket())
    bench.settle()
    assert met(reader, number).error is None
