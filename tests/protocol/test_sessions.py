"""Sessions: who answers at an address, whether we may exchange blocks with it, and what happens when it goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pd_connector.errors import LayoutMismatch, PDError, PeerLost, TransportUnavailable
from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits
from pd_connector.protocol.session import SessionState

from .bench import Agent, Bench, layout, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def error(agent: Agent, number: int) -> PDError:
    end = agent.outcome(number)
    assert end is not None, "the transfer has not ended"
    assert end.error is not None
    return end.error


def works(bench: Bench, owner: Agent, reader: Agent, lease: int) -> bool:
    number = reader.pull(owner.grant(lease))
    bench.settle()
    reader.complete()
    bench.settle()
    end = reader.outcome(number)
    return end is not None and end.outcome == "done"


# --- compatibility ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "another"}, "model: ours 'm', theirs 'another'"),
        (
            {"layout": layout("packed")},
            "group 0 kv is packed as: ours 4 bytes per 1 token (plain), theirs 4 bytes per 1 token (packed)",
        ),
        (
            {"layout": layout(groups=2)},
            "KV cache groups: ours 1 (full of 2 layers), theirs 2 (full of 2 layers, full of 2 layers)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(bench: Bench, fields: dict[str, object], words: str) -> None:
    owner, reader = bench.agent("p", **fields), bench.agent("d")
    number = reader.pull(owner.grant())
    bench.settle()
    refused = error(reader, number)
    assert isinstance(refused, LayoutMismatch)
    assert words in refused.diff
    assert "p at at-p" in str(refused)
    assert owner.core.counters["hellos_refused"] == 1
    assert owner.said(m.Welcome)[0].refused
    assert not reader.core.reader.dialer.sessions


def test_another_protocol_version_is_refused(bench: Bench) -> None:
    owner = bench.agent("p")
    hello = m.Hello(src=7, dst=0, version=99, agent="d", model="m", layout=layout(), transports={})
    owner.feed(ev.Received("<d", m.encode(hello)))
    assert owner.said(m.Welcome)[0].refused == f"protocol version: ours {m.VERSION}, theirs 99"
    reader = bench.agent("d")
    number = reader.pull(owner.ticket())
    welcome = owner.said(m.Welcome)[0]
    fields = {name: getattr(welcome, name) for name in welcome.__struct_fields__}
    new = m.Welcome(**{**fields, "dst": reader.incarnation, "version": 99, "refused": ""})
    reader.feed(ev.Received(owner.address, m.encode(new)))
    assert f"protocol version: ours {m.VERSION}, theirs 99" in str(error(reader, number))


def test_a_peer_without_a_model_name_fits(bench: Bench) -> None:
    assert works(bench, bench.agent("p", model=""), bench.agent("d"), 1)


def test_a_peer_without_memory(bench: Bench) -> None:
    owner, reader = bench.agent("p", layout=None, transports={}), bench.agent("d")
    number = reader.pull(owner.ticket())
    bench.settle()
    assert isinstance(error(reader, number), TransportUnavailable)


def test_no_transport_connects(bench: Bench) -> None:
    bench.connects = False
    owner, reader = bench.agent("p"), bench.agent("d")
    number = reader.pull(owner.grant())
    bench.settle()
    (connect,) = reader.take(ev.Connect)
    assert connect.transports == {"t": b"reach me"}
    reader.feed(ev.Connected(connect.peer, error="t: no route"))
    assert "no route" in str(error(reader, number))
    assert isinstance(error(reader, number), TransportUnavailable)
    bench.connects = True
    assert works(bench, owner, reader, 2)


@pytest.mark.parametrize("stage", ["HELLO", "connecting a transport"])
def test_a_peer_that_never_answers(bench: Bench, stage: str) -> None:
    bench.connects = False
    owner, reader = bench.agent("p"), bench.agent("d")
    if stage == "HELLO":
        bench.drop = (m.Welcome,)
    number = reader.pull(owner.grant())
    bench.settle()
    bench.wait(5.1)
    assert isinstance(error(reader, number), PeerLost)
    assert stage in str(error(reader, number))
    assert reader.idle()


def test_many_pulls_greet_once(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    for lease in range(1, 6):
        reader.pull(owner.grant(lease))
    bench.settle()
    assert len(reader.said(m.Hello)) == 1
    reader.complete()
    bench.settle()
    assert reader.core.counters["transfers_done"] == 5


# --- restarts and losses ----------------------------------------------------------------------------------------------


def test_a_restart_fails_what_was_under_way_and_the_next_pull_works(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    owner = bench.agent("p")
    owner.grant(1)
    owner.grant(2)
    reader.complete()  # of the old memory or the new one, who knows: COMMIT finds out
    bench.settle()
    assert isinstance(error(reader, number), PeerLost)
    assert "restarted" in str(error(reader, number))
    assert not owner.lease_ends
    assert works(bench, owner, reader, 3)


def test_a_new_ticket_after_an_unnoticed_restart_probes(bench: Bench) -> None:
    _, reader = ready_pair(bench)
    owner = bench.agent("p")
    assert works(bench, owner, reader, 1)
    assert reader.core.counters["sessions_lost"] == 1


def test_a_forged_incarnation_does_not_break_the_session(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    good = reader.pull(owner.grant(2))
    bench.settle()
    forged = reader.pull(owner.ticket(2, incarnation=0xBAD))
    (session,) = reader.core.reader.dialer.sessions.values()
    assert session.state is SessionState.PROBING
    late = reader.pull(owner.grant(3))
    bench.settle()
    assert "forged" in str(error(reader, forged))
    reader.complete()
    bench.settle()
    for number in (good, late):
        end = reader.outcome(number)
        assert end is not None
        assert end.outcome == "done"
    assert reader.core.counters["sessions_lost"] == 0
    assert len(reader.said(m.Hello)) == 1, "the probe"


def test_a_probe_that_nobody_answers_ends_the_session(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    bench.drop = (m.Hello,)
    number = reader.pull(owner.ticket(2, incarnation=0xBAD))
    bench.settle()
    bench.wait(5.1)
    assert isinstance(error(reader, number), PeerLost)
    bench.drop = ()
    assert works(bench, owner, reader, 2)


def test_bye(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2))
    bench.settle()
    reader.feed(ev.Received(owner.address, m.encode(m.Bye(src=1, dst=reader.incarnation))))
    assert reader.outcome(number) is None, "somebody else says goodbye"
    reader.feed(ev.Received(owner.address, m.encode(m.Bye(src=owner.incarnation, dst=reader.incarnation))))
    reader.cancelled()
    assert isinstance(error(reader, number), PeerLost)


def test_losing_a_session_lets_go_of_it(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    reader.feed(ev.Disconnected(owner.address, "cable"))
    assert [disconnect.peer for disconnect in reader.take(ev.Disconnect)]
    assert [hangup.route for hangup in reader.take(ev.Hangup)] == [owner.address]
    reader.feed(ev.Disconnected(owner.address, "again"))
    assert not reader.take(ev.Hangup)
    assert works(bench, owner, reader, 2)


def test_waiting_transfers_fail_with_the_session(bench: Bench) -> None:
    owner, reader = ready_pair(bench, max_transfers_per_peer=1)
    numbers = [reader.pull(owner.grant(lease)) for lease in (2, 3)]
    bench.settle()
    reader.feed(ev.Disconnected(owner.address, "cable"))
    reader.cancelled()
    for number in numbers:
        assert isinstance(error(reader, number), PeerLost)


def test_late_answers_to_a_greeting_change_nothing(bench: Bench) -> None:
    owner, reader = bench.agent("p"), bench.agent("d")
    reader.pull(owner.grant())
    bench.settle()
    (welcome,) = owner.said(m.Welcome)
    before = reader.core.counters["late_events"]
    reader.feed(ev.Received(owner.address, m.encode(welcome)))
    reader.feed(ev.Received("at-nobody", m.encode(welcome)))
    reader.feed(ev.Connected("p#whoever", "t"))
    assert reader.core.counters["late_events"] == before + 3


def test_guests_are_bounded_and_hear_goodbye(bench: Bench) -> None:
    owner = bench.agent("p", Limits(max_guests=3))
    for n in range(10):
        hello = m.Hello(src=100 + n, dst=0, version=1, agent="d", model="m", layout=None, transports={})
        owner.feed(ev.Received(f"<guest{n}", m.encode(hello)))
    owner.feed(ev.Close())
    assert [bye.dst for bye in owner.said(m.Bye)] == [107, 108, 109]


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_speaker_leads_to_its_ranks(bench: Bench) -> None:
    ranks = [bench.agent(f"p{rank}", layout=layout(rank=rank)) for rank in (0, 1)]
    speaker = bench.speaker("p", *ranks)
    for rank, owner in enumerate(ranks):
        reader = bench.agent(f"d{rank}", layout=layout(rank=rank))
        owner.grant(1)
        number = reader.pull(speaker.ticket(1), rank=rank)
        bench.settle()
        reader.complete()
        bench.settle()
        end = reader.outcome(number)
        assert end is not None
        assert end.outcome == "done"
        assert owner.lease_ends
        assert {session.agent for session in reader.core.reader.dialer.sessions.values()} == {"p", f"p{rank}"}


def test_a_rank_that_is_not_there(bench: Bench) -> None:
    speaker, reader = bench.speaker("p", bench.agent("p0")), bench.agent("d")
    number = reader.pull(speaker.ticket(1), rank=3)
    bench.settle()
    assert isinstance(error(reader, number), LayoutMismatch)
    assert "rank 3" in str(error(reader, number))


def test_a_directory_that_leads_to_a_directory(bench: Bench) -> None:
    inner = bench.speaker("inner", bench.agent("p0"))
    outer, reader = bench.speaker("outer", inner), bench.agent("d")
    number = reader.pull(outer.ticket(1))
    bench.settle()
    assert isinstance(error(reader, number), LayoutMismatch)


def test_a_directory_that_leads_to_itself_and_back(bench: Bench) -> None:
    rank, reader = bench.agent("p0"), bench.agent("d")
    speaker = bench.speaker("p", rank)
    back = (m.Endpoint(0, speaker.address, speaker.incarnation, layout()),)
    rank.core.identity = replace(rank.core.identity, directory=back)
    number = reader.pull(speaker.ticket(1))
    bench.settle()
    assert isinstance(error(reader, number), LayoutMismatch)


def test_a_restarted_rank_is_found_out(bench: Bench) -> None:
    rank, reader = bench.agent("p0"), bench.agent("d")
    speaker = bench.speaker("p", rank)
    rank.grant(1)
    number = reader.pull(speaker.ticket(1))
    bench.settle()
    reader.feed(ev.Abort(number))
    reader.cancelled()
    bench.agent("p0").grant(1)
    number = reader.pull(speaker.ticket(1))
    bench.settle()
    reader.complete()
    bench.settle()
    assert isinstance(error(reader, number), PeerLost)
