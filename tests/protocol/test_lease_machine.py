"""The owner against a model of it: whatever readers, engine and time do, the verdicts are those of the model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits

from .bench import CAPABILITY, Bench

NUMBERS = st.integers(1, 3)
READERS = st.sampled_from(["d", "e", "f"])


class OwnerMachine(RuleBasedStateMachine):
    """The model: per held lease its epoch, end, cap and readers who are done; each lease lasts 2 s, 6 s at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.owner = self.bench.agent("p", Limits(park=0.5))
        self.held: dict[int, tuple[int, float, float, set[str]]] = {}
        self.epochs: dict[int, int] = {}
        self.granted = 0
        self.asked = 0

    def expire(self) -> None:
        self.held = {number: lease for number, lease in self.held.items() if lease[1] > self.bench.now}

    @rule(number=NUMBERS)
    def grant(self, number: int) -> None:
        if number not in self.held:
            self.epochs[number] = self.epochs.get(number, 0) + 1
            self.owner.grant(number, self.epochs[number], readers=2, seconds=2.0, cap_seconds=6.0)
            now = self.bench.now
            self.held[number] = (self.epochs[number], now + 2.0, now + 6.0, set())
            self.granted += 1

    @rule(number=NUMBERS)
    def take_back(self, number: int) -> None:
        self.owner.feed(ev.End(number, "taken back"))
        self.held.pop(number, None)

    @rule(number=NUMBERS)
    def extend(self, number: int) -> None:
        self.owner.feed(ev.Extend(number))
        self.renew(number)

    @rule(quarters=st.integers(1, 8))
    def time_passes(self, quarters: int) -> None:
        self.bench.now += 0.25 * quarters
        self.expire()

    @rule(number=NUMBERS, reader=READERS, final=st.booleans(), old=st.booleans(), forged=st.booleans())
    def commit(self, number: int, reader: str, final: bool, old: bool, forged: bool) -> None:
        epoch = self.epochs.get(number, 0) - old
        if epoch < 1:
            return
        self.asked += 1
        message = m.Commit(
            src=7,
            dst=self.owner.incarnation,
            transfer=self.asked,
            part=0,
            lease=number,
            epoch=epoch,
            capability=bytes(16) if forged else CAPABILITY,
            reader=reader,
            final=final,
        )
        expected = number in self.held and not forged and not old
        for _ in range(2):  # repeated, it gets the same answer
            self.owner.sent.clear()
            self.owner.feed(ev.Received("<d", m.encode(message)))
            (answer,) = self.owner.said(m.Verdict)
            assert answer.held == expected
        if expected and not final:
            self.renew(number)
        elif expected:
            self.held[number][3].add(reader)
            if len(self.held[number][3]) == 2:
                del self.held[number]

    def renew(self, number: int) -> None:
        if number in self.held:
            epoch, end, cap, done = self.held[number]
            self.held[number] = (epoch, max(end, min(self.bench.now + 2.0, cap)), cap, done)

    @invariant()
    def the_table_is_the_model(self) -> None:
        self.owner.feed(ev.Tick())
        assert {lease.number: lease.epoch for lease in self.owner.core.owner.table.all()} == {
            number: lease[0] for number, lease in self.held.items()
        }
        ends = self.owner.lease_ends
        assert len(ends) == len({(number, epoch) for number, epoch, _ in ends}) == self.granted - len(self.held)
        assert len(self.owner.core._context.timers) == len(self.held)


TestOwnerMachine = OwnerMachine.TestCase
TestOwnerMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
