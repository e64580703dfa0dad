"""The transition tables: every state can be reached and left, every pair is listed or changes nothing."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest

from pd_connector.protocol import lease, session, transfer
from pd_connector.protocol.events import Pull

from .bench import Bench, plan

TABLES = [
    pytest.param(lease.TRANSITIONS, lease.LeaseState, lease.LeaseInput, "held", {"ended"}, id="lease"),
    pytest.param(session.TRANSITIONS, session.SessionState, session.SessionInput, "greeting", {"closed"}, id="session"),
    pytest.param(
        transfer.TRANSITIONS, transfer.TransferState, transfer.TransferInput, "connecting", {"ended"}, id="transfer"
    ),
]
Table = dict[tuple[Any, Any], Any]


@pytest.mark.parametrize(("table", "states", "inputs", "first", "final"), TABLES)
def test_every_state_is_reached_and_every_input_used(
    table: Table, states: type[StrEnum], inputs: type[StrEnum], first: str, final: set[str]
) -> None:
    reached, grew = {states(first)}, True
    while grew:
        after = reached | {to for (state, _), to in table.items() if state in reached}
        grew, reached = after != reached, after
    assert reached == set(states)
    assert {what for _, what in table} == set(inputs)
    left = {before for before, _ in table}
    assert set(states) - left == {states(name) for name in final}


@pytest.mark.parametrize(("table", "states", "inputs", "first", "final"), TABLES)
def test_every_state_can_end(
    table: Table, states: type[StrEnum], inputs: type[StrEnum], first: str, final: set[str]
) -> None:
    for start in states:
        reached, grew = {start}, True
        while grew:
            after = reached | {to for (state, _), to in table.items() if state in reached}
            grew, reached = after != reached, after
        assert reached & {states(name) for name in final}


def machines() -> list[Any]:
    pull_plan = plan()
    bench = Bench()
    ticket = bench.agent("p").ticket()
    return [
        lease.Lease(1, 1, b"", {}, 1, 1.0, 1.0, 1.0),
        session.Session("there"),
        transfer.Transfer(Pull(1, ticket, ((pull_plan,),), 1.0), 0.0, "there", 1, 1.0),
    ]


@pytest.mark.parametrize(("table", "states", "inputs", "first", "final"), TABLES)
def test_a_pair_that_is_not_listed_changes_nothing(
    table: Table, states: type[StrEnum], inputs: type[StrEnum], first: str, final: set[str]
) -> None:
    (machine,) = (one for one in machines() if isinstance(one.state, states))
    for state in states:
        for what in inputs:
            machine.state = state
            machine.step(what)
            assert machine.state is table.get((state, what), state)


def test_steps_say_what_changed() -> None:
    one, peer, pull = machines()
    assert not one.step(lease.LeaseInput.RENEWED)
    assert one.step(lease.LeaseInput.EXPIRED)
    assert not one.step(lease.LeaseInput.TAKEN_BACK)
    assert one.reason == "expired"
    assert peer.step(session.SessionInput.WELCOMED)
    assert not peer.step(session.SessionInput.WELCOMED)
    assert pull.step(transfer.TransferInput.PEER_READY)
    assert not pull.step(transfer.TransferInput.QUIET)
