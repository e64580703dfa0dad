"""KVLayout: equal fingerprints and no diff mean the same, and a diff says in words what is in the way."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.layout import GroupLayout, KVLayout

GROUP = GroupLayout(
    kind="full", block_tokens=16, heads=8, head_dim=128, dtype="bfloat16", layers=("l0", "l1"), part_bytes=(64, 64)
)
LAYOUT = KVLayout(packing="flash/NHD", rank=0, ranks=1, groups=(GROUP,))

groups = st.builds(
    GroupLayout,
    kind=st.sampled_from(["full", "sliding_window"]),
    block_tokens=st.sampled_from([16, 32]),
    heads=st.integers(0, 2),
    head_dim=st.sampled_from([0, 64]),
    dtype=st.sampled_from(["bfloat16", "fp8"]),
    layers=st.lists(st.sampled_from(["a", "b", "c"]), max_size=3, unique=True).map(tuple),
    part_bytes=st.lists(st.integers(1, 3), max_size=3).map(tuple),
)
layouts = st.builds(
    KVLayout,
    packing=st.sampled_from(["p", "q"]),
    rank=st.integers(0, 1),
    ranks=st.integers(1, 2),
    groups=st.lists(groups, max_size=2).map(tuple),
)


def change(**fields: object) -> KVLayout:
    return msgspec.structs.replace(LAYOUT, groups=(msgspec.structs.replace(GROUP, **fields),))


@given(layouts, layouts)
def test_no_diff_means_same_rank_and_fingerprint(ours: KVLayout, theirs: KVLayout) -> None:
    same = ours.rank == theirs.rank and ours.fingerprint() == theirs.fingerprint()
    assert (ours.diff(theirs) == []) == same
    assert (ours == theirs) == same
    assert len(ours.diff(theirs)) == len(theirs.diff(ours))


@given(layouts)
def test_it_travels_unchanged(layout: KVLayout) -> None:
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout)
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (msgspec.structs.replace(LAYOUT, packing="amx/NHD"), "block packing: ours 'flash/NHD', theirs 'amx/NHD'"),
        (msgspec.structs.replace(LAYOUT, ranks=2), "tensor-parallel size: ours 1, theirs 2"),
        (msgspec.structs.replace(LAYOUT, rank=1), "rank: ours 0, theirs 1"),
        (msgspec.structs.replace(LAYOUT, groups=()), "KV cache groups: ours 1, theirs 0"),
        (change(kind="sliding_window"), "group 0 attention kind: ours 'full', theirs 'sliding_window'"),
        (change(block_tokens=32), "group 0 block size in tokens: ours 16, theirs 32"),
        (change(heads=4), "group 0 KV heads per rank: ours 8, theirs 4"),
        (change(head_dim=64), "group 0 head size: ours 128, theirs 64"),
        (change(dtype="fp8"), "group 0 dtype: ours 'bfloat16', theirs 'fp8'"),
        (change(layers=("l0",)), "group 0 layers: ours 2, theirs 1, missing there: l1"),
        (change(layers=("l0", "l2")), "group 0 layers: ours 2, theirs 2, missing there: l1, only there: l2"),
        (change(layers=("l1", "l0")), "group 0 layers: ours 2, theirs 2, in another order"),
        (change(part_bytes=(64, 32)), "group 0 bytes per block: ours 64 + 64, theirs 64 + 32"),
        (change(part_bytes=(128,)), "group 0 bytes per block: ours 64 + 64, theirs 128"),
    ],
)
def test_each_difference_is_one_sentence(other: KVLayout, words: str) -> None:
    assert LAYOUT.diff(other) == [words]


def test_long_lists_of_parts_stay_readable() -> None:
    (words,) = change(part_bytes=(64,) * 500).diff(change(part_bytes=(64,) * 499 + (1,)))
    assert len(words) < 150


def test_the_fingerprint_is_of_meaning_not_of_rank() -> None:
    assert LAYOUT.fingerprint() == msgspec.structs.replace(LAYOUT, rank=1, ranks=1).fingerprint()
    assert len(LAYOUT.fingerprint()) == 32
    assert LAYOUT.block_bytes(0) == 128


@pytest.mark.parametrize(
    "bad",
    [{"block_tokens": 0}, {"heads": -1}, {"layers": ["x" * 300]}, {"part_bytes": [1] * 20000}, {"kind": "k" * 257}],
)
def test_a_layout_from_the_wire_is_bounded(bad: dict[str, object]) -> None:
    document = msgspec.to_builtins(LAYOUT)
    document["groups"][0].update(bad)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(document, KVLayout)
