"""Timers against the simplest thing that could be right: a dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pd_connector.protocol.timers import Timers

KEYS = st.integers(0, 5)
TIMES = st.integers(0, 20).map(float)
STEPS = st.lists(
    st.tuples(st.just("set"), KEYS, TIMES)
    | st.tuples(st.just("cancel"), KEYS, TIMES)
    | st.tuples(st.just("due"), KEYS, TIMES),
    max_size=60,
)


@given(STEPS)
def test_like_a_dictionary(steps: list[tuple[str, int, float]]) -> None:
    timers, model = Timers(), dict[int, float]()
    for what, key, when in steps:
        if what == "set":
            timers.set(key, when)
            model[key] = when
        elif what == "cancel":
            timers.cancel(key)
            model.pop(key, None)
        else:
            due = list(timers.due(when))
            assert sorted(map(str, due)) == sorted(str(key) for key, at in model.items() if at <= when)
            assert [model[key] for key in due] == sorted(at for at in model.values() if at <= when)
            model = {key: at for key, at in model.items() if at > when}
        assert len(timers) == len(model)
        assert timers.next() == (min(model.values()) if model else None)


def test_a_timer_that_is_set_while_due_ones_fire_fires_too() -> None:
    timers = Timers()
    timers.set("a", 1.0)
    fired = []
    for key in timers.due(5.0):
        fired.append(key)
        if key == "a":
            timers.set("b", 2.0)
            timers.set("c", 9.0)
    assert fired == ["a", "b"]
    assert timers.next() == 9.0


def test_moving_a_deadline_does_not_grow_the_heap() -> None:
    timers = Timers()
    for n in range(10_000):
        timers.set("moved", float(n))
    assert len(timers._heap) < 200
    assert list(timers.due(1e9)) == ["moved"]
