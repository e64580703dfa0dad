"""The slot table against a model of its own: random loans, returns, revocations, deadlines and deaths."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pd_connector.transport.base import LeaseId
from pd_connector.transport.staging import Loan, SlotTable, Verdict, share

SLOTS, HOLD_S, WAIT_S, WAITING = 4, 10.0, 20.0, 3
READERS = st.sampled_from("abc")
LEASES = st.builds(LeaseId, st.integers(1, 2), st.integers(1, 2))


class Slots(RuleBasedStateMachine):
    """``lent`` is what readers were told, ``filling`` what the device is at; both in the order of their beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table: SlotTable[int] = SlotTable(SLOTS, HOLD_S, WAIT_S, WAITING)
        self.waiting: dict[str, list[tuple[int, LeaseId, float]]] = {reader: [] for reader in "abc"}
        self.filling: list[tuple[Loan[int], bool]] = []
        self.lent: list[tuple[Loan[int], float]] = []
        self.over: list[tuple[Loan[int], Verdict]] = []
        self.asked = 0

    def held(self) -> Counter[object]:
        return Counter(loan.reader for loan, _ in [*self.filling, *self.lent])

    @rule(reader=READERS, lease=LEASES)
    def ask(self, reader: str, lease: LeaseId) -> None:
        self.asked += 1
        room = len(self.waiting[reader]) < WAITING
        assert self.table.ask(reader, lease, self.asked, self.now) == room
        if room:
            self.waiting[reader].append((self.asked, lease, self.now + WAIT_S))

    @rule()
    def lend(self) -> None:
        held = self.held()
        able = [reader for reader in "abc" if self.waiting[reader] and held[reader] < share(SLOTS)]
        loan = self.table.lend()
        assert (loan is not None) == bool(able and held.total() < SLOTS)
        if loan is not None:
            assert loan.reader in able
            assert held[loan.reader] == min(held[reader] for reader in able), "who holds the fewest is next"
            request, lease, _ = self.waiting[str(loan.reader)].pop(0)
            assert (loan.request, loan.lease) == (request, lease)
            self.filling.append((loan, False))

    @rule(data=st.data())
    def filled(self, data: st.DataObject) -> None:
        if self.filling:
            loan, void = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
            assert self.table.filled(loan, self.now) == (not void)
            if not void:
                self.lent.append((loan, self.now + HOLD_S))

    @rule(data=st.data())
    def fail_to_fill(self, data: st.DataObject) -> None:
        if self.filling:
            loan, _ = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
            self.table.drop(loan)

    @rule(data=st.data(), reader=READERS)
    def give_back(self, data: st.DataObject, reader: str) -> None:
        if self.lent:
            index = data.draw(st.integers(0, len(self.lent) - 1))
            loan, _ = self.lent[index]
            verdict = self.table.give_back(reader, loan.slot, loan.epoch)
            assert verdict is (Verdict.HELD if reader == loan.reader else Verdict.UNKNOWN)
            if verdict is Verdict.HELD:
                del self.lent[index]
                assert self.table.give_back(reader, loan.slot, loan.epoch) is Verdict.UNKNOWN

    @rule()
    def give_back_what_is_over(self) -> None:
        for loan, verdict in self.over:
            assert self.table.give_back(loan.reader, loan.slot, loan.epoch) is verdict
        self.over.clear()

    @rule()
    def give_back_what_is_being_filled(self) -> None:
        for loan, _ in self.filling:
            assert self.table.give_back(loan.reader, loan.slot, loan.epoch) is Verdict.UNKNOWN

    @rule(lease=LEASES)
    def revoke(self, lease: LeaseId) -> None:
        ended = [loan for loan, _ in self.lent if loan.lease == lease]
        assert set(self.table.revoke(lease)) == set(ended)
        self.over += [(loan, Verdict.REVOKED) for loan in ended]
        self.lent = [(loan, until) for loan, until in self.lent if loan.lease != lease]
        self.filling = [(loan, void or loan.lease == lease) for loan, void in self.filling]

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        late = [loan for loan, until in self.lent if until <= self.now]
        waited = {n for queue in self.waiting.values() for n, _, until in queue if until <= self.now}
        loans, requests = self.table.expire(self.now)
        assert set(loans) == set(late)
        assert {request for _, request in requests} == waited
        self.over += [(loan, Verdict.LATE) for loan in late]
        self.lent = [(loan, until) for loan, until in self.lent if until > self.now]
        for reader, queue in self.waiting.items():
            self.waiting[reader] = [each for each in queue if each[2] > self.now]

    @rule(reader=READERS)
    def die(self, reader: str) -> None:
        gone = [loan for loan, _ in self.lent if loan.reader == reader]
        assert set(self.table.forget(reader)) == set(gone)
        self.over += [(loan, Verdict.UNKNOWN) for loan in gone]
        self.lent = [(loan, until) for loan, until in self.lent if loan.reader != reader]
        self.waiting[reader] = []

    @invariant()
    def no_slot_is_lent_twice(self) -> None:
        loans = [loan for loan, _ in [*self.filling, *self.lent]]
        slots = {loan.slot for loan in loans}
        assert len(slots) == len(loans)
        assert slots <= set(range(SLOTS))
        assert self.table.num_free == SLOTS - len(slots)

    @invariant()
    def no_epoch_comes_again(self) -> None:
        keys = [loan.key for loan, _ in [*self.filling, *self.lent, *self.over]]
        assert len(keys) == len(set(keys))

    @invariant()
    def nobody_has_more_than_a_share(self) -> None:
        assert max(self.held().values(), default=0) <= share(SLOTS)

    @invariant()
    def the_next_deadline_is_the_nearest(self) -> None:
        known = [until for _, until in self.lent]
        known += [until for queue in self.waiting.values() for _, _, until in queue[:1]]
        assert self.table.next_deadline() == min(known, default=None)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 2), (3, 2), (8, 4), (9, 4)])
def test_a_share(slots: int, most: int) -> None:
    assert share(slots) == most


def test_those_who_wait_in_all_are_bounded() -> None:
    table: SlotTable[int] = SlotTable(1, HOLD_S, WAIT_S, 2, 3)
    asked = [table.ask(reader, LeaseId(1, 1), 0, 0.0) for reader in ("a", "a", "a", "b", "b")]
    assert asked == [True, True, False, True, False]
    table.forget("a")
    assert table.ask("b", LeaseId(1, 1), 0, 0.0)


def test_what_ended_long_ago_is_forgotten() -> None:
    table: SlotTable[int] = SlotTable(1, 0.0, WAIT_S)
    first: Loan[int] | None = None
    for _ in range(1100):
        assert table.ask("a", LeaseId(1, 1), 0, 0.0)
        loan = table.lend()
        assert loan is not None
        first = first or loan
        table.filled(loan, 0.0)
        table.expire(0.0)
    assert table.give_back("a", loan.slot, loan.epoch) is Verdict.LATE
    assert table.give_back("a", first.slot, first.epoch) is Verdict.UNKNOWN


def test_readers_take_turns() -> None:
    table: SlotTable[int] = SlotTable(1, HOLD_S, WAIT_S)
    for reader in ("a", "a", "a", "b", "c", "b"):
        table.ask(reader, LeaseId(1, 1), 0, 0.0)
    order = []
    while (loan := table.lend()) is not None:
        order.append(loan.reader)
        table.drop(loan)
    assert order == ["a", "b", "c", "a", "b", "a"]
