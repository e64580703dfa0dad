"""KVLayout: what can be exchanged has no diff, and a diff says in words what is in the way."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.errors import LayoutMismatch
from pd_connector.layout import Form, GroupLayout, KVLayout, Part, heads_of_rank, phases, strided_parts

PART = Part(name="kv", unit_bytes=4, token_stride=4, head_stride=64)
FORM = Form(block_bytes=(512,), parts=(PART,))
GROUP = GroupLayout(
    kind="full", block_tokens=16, heads=8, total_heads=8, dtype="bfloat16", layers=("l0", "l1"), forms=(FORM,),
    form_of=(0, 0),
)  # fmt: skip
LAYOUT = KVLayout(platform="flash", groups=(GROUP,))

sizes = st.sampled_from([16, 32, 48])


@st.composite
def groups(draw: st.DrawFn) -> GroupLayout:
    heads, tokens, unit = draw(st.integers(1, 2)), draw(sizes), draw(st.sampled_from([1, 16]))
    parts = tuple(
        Part(name=name, grid=grid, unit_tokens=unit, unit_bytes=8, token_stride=8, packing=draw(st.sampled_from("pq")))
        for grid, name in enumerate(draw(st.sampled_from([("kv",), ("k", "v")])))
    )
    layers = tuple(draw(st.lists(st.sampled_from("abc"), max_size=3, unique=True)))
    form = Form(block_bytes=(tokens * 8,) * len(parts), parts=parts)
    return GroupLayout(
        kind=draw(st.sampled_from(["full", "sliding_window"])), block_tokens=tokens, heads=heads, total_heads=2,
        dtype=draw(st.sampled_from(["bfloat16", "fp8"])), layers=layers, forms=(form,), form_of=(0,) * len(layers),
    )  # fmt: skip


layouts = st.builds(
    KVLayout, rank=st.integers(0, 1), ranks=st.integers(1, 2), groups=st.lists(groups(), max_size=2).map(tuple)
)


def change(**fields: object) -> KVLayout:
    return msgspec.structs.replace(LAYOUT, groups=(msgspec.structs.replace(GROUP, **fields),))


def packed(**fields: object) -> KVLayout:
    form = msgspec.structs.replace(FORM, parts=(msgspec.structs.replace(PART, **fields),))
    return change(forms=(form,))


@given(layouts, layouts)
def test_both_sides_come_to_the_same_answer(ours: KVLayout, theirs: KVLayout) -> None:
    assert len(ours.diff(theirs)) == len(theirs.diff(ours))
    assert ours.diff(ours) == []
    if ours.fingerprint() == theirs.fingerprint():
        assert ours.diff(theirs) == []


@given(layouts)
def test_it_travels_unchanged(layout: KVLayout) -> None:
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout)
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()


TWO = Form(
    block_bytes=(256, 256), parts=tuple(msgspec.structs.replace(PART, name=n, grid=g) for g, n in enumerate("kv"))
)


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(LAYOUT, ranks=2, rank=1, platform="another"),
        change(block_tokens=8),
        change(heads=4, first_head=4),
        change(layers=("l1", "l0")),
        change(layers=("l7", "l8")),
        packed(token_stride=32, head_stride=4),
    ],
)
def test_what_need_not_be_alike(other: KVLayout) -> None:
    assert LAYOUT.diff(other) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (msgspec.structs.replace(LAYOUT, groups=()), "KV cache groups: ours 1 (full of 2 layers), theirs 0 ()"),
        (change(kind="sliding_window"), "group 0 attention kind: ours 'full', theirs 'sliding_window'"),
        (change(total_heads=16), "group 0 KV heads of the model: ours 8, theirs 16"),
        (change(dtype="fp8"), "group 0 dtype: ours 'bfloat16', theirs 'fp8'"),
        (packed(unit_bytes=2), "group 0 kv is packed as: ours 4 bytes per 1 token, theirs 2 bytes per 1 token"),
        (
            packed(chunks=2, unit_bytes=2, chunk_stride=2, packing="amx"),
            "group 0 kv is packed as: ours 4 bytes per 1 token, theirs 2 bytes per 1 token in 2 chunks (amx)",
        ),
        (packed(name="latent"), "group 0 blocks hold: ours kv, theirs latent"),
        (change(forms=(TWO,), heads=4), "group 0 blocks hold: ours kv, theirs k, v"),
    ],
)
def test_each_difference_is_one_sentence(other: KVLayout, words: str) -> None:
    assert LAYOUT.diff(other) == [words]


def test_block_sizes_that_are_packed_as_a_whole_or_hardly_ever_meet() -> None:
    whole = packed(unit_tokens=16, unit_bytes=64)
    other = change(block_tokens=32, heads=4, forms=(
        Form(block_bytes=(512,), parts=(Part(name="kv", unit_tokens=32, unit_bytes=128, token_stride=128),)),
    ))  # fmt: skip
    assert whole.diff(other)[1:] == ["group 0 block size in tokens: ours 16, theirs 32"]
    assert phases(16, 128) == 8
    assert phases(48, 32) == 4
    odd = change(block_tokens=127, heads=1)
    assert LAYOUT.diff(odd) == ["group 0 block size in tokens: ours 16, theirs 127, with too few common bounds"]


def test_the_fingerprint_is_of_meaning_not_of_rank() -> None:
    assert LAYOUT.fingerprint() == msgspec.structs.replace(LAYOUT, rank=1, platform="x").fingerprint()
    assert len(LAYOUT.fingerprint()) == 32
    assert LAYOUT.block_bytes(0) == 1024
    assert GROUP.grid_bytes == (512, 512)


@pytest.mark.parametrize(
    "bad",
    [
        {"block_tokens": 0}, {"heads": 0}, {"heads": 9}, {"first_head": 1}, {"layers": ["x" * 300] * 2},
        {"layers": ["only one"]}, {"form_of": [0, 1]}, {"kind": "k" * 257}, {"forms": []}, {"total_heads": 2**21},
        {"forms": [{"block_bytes": [511], "parts": msgspec.to_builtins(FORM.parts)}]},
        {"forms": [{"block_bytes": [512], "parts": [msgspec.to_builtins(PART) | {"grid": 1}]}]},
        {"forms": [{"block_bytes": [512], "parts": [msgspec.to_builtins(PART) | {"unit_tokens": 5}]}]},
        {"forms": [{"block_bytes": [512], "parts": [msgspec.to_builtins(PART) | {"offset": 1}]}]},
        {"forms": [{"block_bytes": [512], "parts": [msgspec.to_builtins(PART) | {"chunks": 2, "chunk_stride": 2}]}]},
        {"forms": [{"block_bytes": [512] * 65, "parts": msgspec.to_builtins(FORM.parts)}]},
        {"forms": [{"block_bytes": [512], "parts": []}]},
        {"forms": [{"block_bytes": [512], "parts": msgspec.to_builtins(FORM.parts) * 2}]},
        {"layers": ["l0", "l0"]},
    ],
)  # fmt: skip
def test_a_layout_from_the_wire_is_bounded(bad: dict[str, object]) -> None:
    document = msgspec.to_builtins(LAYOUT)
    document["groups"][0].update(bad)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(document, KVLayout)


def test_heads_are_divided_as_engines_do() -> None:
    assert [heads_of_rank(8, 4, rank) for rank in range(4)] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    assert [heads_of_rank(2, 4, rank) for rank in range(4)] == [(0, 1), (0, 1), (1, 1), (1, 1)]
    with pytest.raises(LayoutMismatch, match="8 KV heads cannot be divided among 3 ranks"):
        heads_of_rank(8, 3, 0)
    for wrong in ((0, 0, 0), (0, 1, 0), (4, 2, 2), (4, 2, -1)):
        with pytest.raises(LayoutMismatch):
            heads_of_rank(*wrong)


@pytest.mark.parametrize("fields", [{"offset": 1.5}, {"token_stride": -8}, {"unit_tokens": 0}, {"chunks": 0}])
def test_a_layout_made_here_is_checked_too(fields: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        packed(**fields)


def test_parts_of_a_strided_block() -> None:
    k, v = strided_parts({"token": (16, 64), "kv": (2, 32), "head": (2, 16), "channel": (8, 2)}, 2)
    assert (k.name, k.offset, v.name, v.offset) == ("k", 0, "v", 32)
    assert (k.unit_bytes, k.token_stride, k.head_stride, k.chunks) == (16, 64, 16, 1)
    (apart,) = strided_parts({"token": (16, 2), "channel": (8, 32)}, 2, name="latent", packing="p")
    assert (apart.name, apart.unit_bytes, apart.chunks, apart.chunk_stride, apart.packing) == ("latent", 2, 8, 32, "p")
