"""Slots of a bounded pool, against a model that remembers who may still write where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pd_connector.cache.slots import Slots


def test_the_oldest_goes_first_and_never_one_that_is_being_filled() -> None:
    slots = Slots(10)
    assert slots.take(1, 4) == ([0, 1, 2, 3], [])
    assert slots.take(2, 4) == ([4, 5, 6, 7], [])
    assert slots.take(3, 4) is None, "both are being filled"
    assert slots.filled(2)
    found = slots.take(3, 4)
    assert found is not None
    assert found[1] == [2]
    assert slots.filled(1)
    assert slots.filled(3)
    found = slots.take(4, 6)
    assert found is not None
    assert found[1] == [1]
    assert slots.take(5, 11) is None
    assert slots.used == 10


def test_dropped_while_it_is_filled() -> None:
    slots = Slots(4)
    slots.take(1, 3)
    assert slots.drop(1)
    assert slots.used == 3
    assert slots.take(2, 2) is None
    assert not slots.filled(1)
    assert slots.used == 0
    assert not slots.drop(1)


@given(st.lists(st.tuples(st.sampled_from(["take", "fill", "drop"]), st.integers(0, 12)), max_size=80))
def test_nobody_shares_a_slot(steps: list[tuple[str, int]]) -> None:
    slots, held, filling, number = Slots(12), {}, set(), 0
    for what, size in steps:
        if what == "take":
            number += 1
            found = slots.take(number, size)
            if found is None:
                assert size > 12 - sum(len(held[one]) for one in filling)
                continue
            for gone in found[1]:
                assert gone not in filling
                del held[gone]
            held[number] = found[0]
            filling.add(number)
            assert len(found[0]) == size
        elif what == "fill" and filling:
            one = sorted(filling)[size % len(filling)]
            filling.discard(one)
            if not slots.filled(one):
                del held[one]
        elif what == "drop" and held:
            one = sorted(held)[size % len(held)]
            assert slots.drop(one)
            if one not in filling:
                del held[one]
        every = [slot for one in held.values() for slot in one]
        assert len(set(every)) == len(every) == slots.used
