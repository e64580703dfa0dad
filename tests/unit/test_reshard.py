"""The planner beside a naive element-by-element gather: any division and arrangement of either side to any other."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_connector.errors import LayoutMismatch, LocalProtocolError
from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.ranks import duties, shares
from pd_connector.reshard import Blocks, Resharding, overlay
from pd_connector.testing.instances import Rank, Shape, Style, execute, instance, logical, write

SIZES = (1, 2, 3, 4, 8, 16)
HEADS = (1, 2, 4, 8)
LATENT = "latent"


def in_parallel(work: Callable[[Any], int], jobs: Sequence[Any]) -> int:
    """Sum of what the jobs checked."""
    with multiprocessing.get_context("fork").Pool() as pool:
        return sum(pool.imap_unordered(work, jobs))


def ids_of(tokens: int, size: int, seed: int, spare: int = 3) -> tuple[Any, int]:
    """Scattered block ids with some neighbours among them, and how many blocks there are."""
    need = -(-tokens // size)
    order = np.random.default_rng(seed).permutation(need + spare)
    order[: need // 2] = np.sort(order[: need // 2])
    return order[:need], need + spare


def check(
    shape: Shape, p: tuple[Style, int, int], d: tuple[Style, int, int], ranges: Sequence[tuple[int, int]], seed: int = 0
) -> int:
    """Every range from an instance (style, TP, PP) to another, all ranks, all bytes. How many ranges."""
    tokens = max(last for _, last in ranges)
    src_ids, src_blocks = ids_of(tokens, p[0].block_tokens, seed)
    dst_ids, dst_blocks = ids_of(tokens, d[0].block_tokens, seed + 1)
    owners, readers = instance(shape, *p, src_blocks), instance(shape, *d, dst_blocks)
    kv = logical(shape, p[0], tokens)
    write(owners, kv, src_ids, 0, tokens)
    layouts = [rank.layout for rank in owners]
    by_reader = [
        [
            (owners[n], Resharding(reader.layout, layouts[n], share))
            for n, share in shares(reader.layout, layouts).items()
        ]
        for reader in readers
    ]
    for first, last in ranges:
        for reader in readers:
            for grid in reader.grids:
                grid[:] = 0
        write(readers, kv, dst_ids, first, last)
        expected = [[grid.copy() for grid in reader.grids] for reader in readers]
        for reader, sources, wanted in zip(readers, by_reader, expected, strict=True):
            for grid in reader.grids:
                grid[:] = 0
            for owner, resharding in sources:
                execute(resharding.plan(0, src_ids, dst_ids, first, last), owner, reader)
            assert all(map(np.array_equal, reader.grids, wanted)), (shape, p, d, first, last, reader.layout.rank)
    return len(ranges)


def divisible(heads: int, *sizes: int) -> bool:
    return all(heads % tp == 0 or tp % heads == 0 for tp in sizes)


def edges(a: int, b: int) -> list[tuple[int, int]]:
    """Twelve ranges around the bounds of blocks of two sizes."""
    big, small = max(a, b), min(a, b)
    return [
        (0, big), (0, 1), (big - 1, big + 1), (1, 2 * big), (small, small + 1), (0, 2 * big + 1), (small - 1, 2 * big),
        (big, 2 * big), (3, 5), (0, small), (small, big + small), (2 * big - 1, 2 * big + 1),
    ]  # fmt: skip


STYLES = [
    (Style("head-major", "head", 16), Style("head-major", "head", 16)),
    (Style("token-major", "inner", 16), Style("token-major", "inner", 16)),
    (Style("head-major", "outer", 16), Style("token-major", "split", 16)),
    (Style("token-major", "split", 16), Style("head-major", "inner", 16)),
    (Style(kv=LATENT), Style(kv=LATENT)),
]
"""(owner's, reader's): of one kind, and across."""


def resized(styles: tuple[Style, Style], a: int, b: int) -> tuple[Style, Style]:
    p, d = styles
    return Style(p.order, p.kv, a), Style(d.order, d.kv, b)


def product(job: tuple[int, int]) -> int:
    tp_p, tp_d = job
    done = 0
    for heads, styles, sizes in itertools.product(HEADS, STYLES, ((16, 16), (16, 32))):
        p, d = resized(styles, *sizes)
        if p.kv == LATENT or divisible(heads, tp_p, tp_d):
            done += check(Shape(heads, 1, 2), (p, tp_p, 1), (d, tp_d, 1), edges(*sizes))
        else:
            with pytest.raises(LayoutMismatch, match="cannot be divided"):
                check(Shape(heads, 1, 2), (p, tp_p, 1), (d, tp_d, 1), [(0, 1)])
    return done


def test_every_tensor_parallel_size_to_every_other() -> None:
    """{1,2,3,4,8,16}² × heads {1,2,4,8} × arrangements and MLA × two block pairs × 12 edge ranges."""
    supported = sum(
        len(STYLES) - 1 if divisible(heads, *pair) else 0 for heads in HEADS for pair in itertools.product(SIZES, SIZES)
    )
    assert in_parallel(product, list(itertools.product(SIZES, SIZES))) == 2 * 12 * (
        supported + len(HEADS) * len(SIZES) ** 2
    )


BLOCK_PAIRS = list(itertools.product((16, 32, 128), repeat=2))
PAIRS = ((1, 1), (2, 1), (1, 2), (4, 2))


def every_range(job: tuple[int, int, int]) -> int:
    """All ranges that begin at ``first``: where each token comes from and goes to. Those that lie within one segment
    are also checked byte by byte: all other ranges are put together of such segments."""
    a, b, first = job
    tokens = 3 * max(a, b)
    src, dst = ids_of(tokens, a, 5)[0], ids_of(tokens, b, 6)[0]
    every = np.arange(tokens)
    source, target = src[every // a] * a + every % a, dst[every // b] * b + every % b
    for last in range(first + 1, tokens + 1):
        where, whence = [], []
        for segment, runs, src_step, dst_step in overlay(Blocks(src, a), Blocks(dst, b), first, last):
            for first_src, first_dst, count in runs.tolist():
                steps, places = np.arange(count)[:, None], np.arange(segment.tokens)
                where.append(((first_dst + steps * dst_step) * b + segment.dst + places).ravel())
                whence.append(((first_src + steps * src_step) * a + segment.src + places).ravel())
        to, of = np.concatenate(where), np.concatenate(whence)
        order, wanted = np.argsort(to), np.argsort(target[first:last])
        assert np.array_equal(to[order], target[first:last][wanted])
        assert np.array_equal(of[order], source[first:last][wanted])
    if first < math.lcm(a, b):
        bound = min(first // a * a + a, first // b * b + b)
        p, d = Style("token-major", "inner", a), Style("head-major", "split", b)
        for tp_p, tp_d in PAIRS:
            check(Shape(4, 1, 1), (p, tp_p, 1), (d, tp_d, 1), [(first, last) for last in range(first + 1, bound + 1)])
    return tokens - first


@pytest.mark.timeout(300)  # about a minute of two processors, which others may want as well
def test_every_token_range_in_three_large_blocks() -> None:
    jobs = [(a, b, first) for a, b in BLOCK_PAIRS for first in range(3 * max(a, b))]
    expected = sum(n * (n + 1) // 2 for n in (3 * max(pair) for pair in BLOCK_PAIRS))
    assert in_parallel(every_range, jobs) == expected


def whole_ranges(job: tuple[int, int, int]) -> int:
    """Ranges over several blocks, byte by byte, for four TP pairs."""
    a, b, seed = job
    rng = np.random.default_rng(seed)
    ranges = [tuple(sorted(rng.choice(3 * max(a, b) + 1, 2, replace=False).tolist())) for _ in range(40)]
    return sum(
        check(Shape(4, 1, 1), (Style(*p, a), tp_p, 1), (Style(*d, b), tp_d, 1), ranges, seed)
        for tp_p, tp_d in PAIRS
        for p, d in ((("token-major", "inner"), ("head-major", "split")), (("head-major", "head"),) * 2)
    )


def test_ranges_over_several_blocks_of_all_sizes() -> None:
    in_parallel(whole_ranges, [(a, b, seed) for a, b in BLOCK_PAIRS for seed in range(3)])


@pytest.mark.parametrize(("pp_p", "pp_d"), list(itertools.product((1, 2, 4), repeat=2)))
def test_pipeline_stages(pp_p: int, pp_d: int) -> None:
    style = Style("head-major", "head")
    for tp_p, tp_d in PAIRS:
        check(Shape(4, 6, 2), (style, tp_p, pp_p), (style, tp_d, pp_d), [(0, 40), (16, 33)])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_anything_to_anything(data: st.DataObject) -> None:
    order, kv = st.sampled_from(["head-major", "token-major"]), st.sampled_from(["outer", "split", "head", "inner"])
    transposed = data.draw(st.booleans())
    sizes = st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24] + [1] * (not transposed))
    p, d = (
        Style(
            "transposed" if transposed else data.draw(order), "head" if transposed else data.draw(kv), data.draw(sizes)
        )
        for _ in range(2)
    )
    heads, layers = data.draw(st.sampled_from(HEADS)), data.draw(st.integers(1, 5))
    tps = [tp for tp in (1, 2, 3, 4, 8, 16) if divisible(heads, tp)]
    (tp_p, pp_p), (tp_d, pp_d) = (
        (data.draw(st.sampled_from(tps)), data.draw(st.integers(1, min(layers, 3)))) for _ in range(2)
    )
    first = data.draw(st.integers(0, 60))
    last = data.draw(st.integers(first + 1, first + 60))
    shape = Shape(heads, layers, data.draw(st.integers(1, 3)))
    check(shape, (p, tp_p, pp_p), (d, tp_d, pp_d), [(first, last)], data.draw(st.integers(0, 99)))


# --- units of several tokens, chunks ----------------------------------------------------------------------------------


def packed(block_tokens: int, heads: int, first: int, total: int) -> KVLayout:
    """As vLLM packs blocks for AMX, at a head size of 32 and 2 bytes: K by 16 tokens, V by 2 tokens and 16 channels."""
    half = block_tokens * 64
    parts = (
        Part(name="k", unit_tokens=16, unit_bytes=1024, token_stride=1024, head_stride=2 * half, packing="amx"),
        Part(
            name="v", offset=half, unit_tokens=2, unit_bytes=64, token_stride=64, chunks=2,
            chunk_stride=half // 2, head_stride=2 * half, packing="amx",
        ),
    )  # fmt: skip
    form = Form(block_bytes=(2 * half * heads,), parts=parts)
    group = GroupLayout(
        kind="full", block_tokens=block_tokens, heads=heads, first_head=first, total_heads=total, dtype="bfloat16",
        layers=("l",), forms=(form,), form_of=(0,),
    )  # fmt: skip
    return KVLayout(groups=(group,))


def fill(layout: KVLayout, memory: Any, ids: Any, tokens: int) -> None:
    """Every byte named by (head, token, K or V, channel, low or high half), by the formulas of the packing."""
    group = layout.groups[0]
    size, half = group.block_tokens, group.block_tokens * 64
    for head, t, c in itertools.product(range(group.heads), range(tokens), range(32)):
        i = t % size
        k = head * 2 * half + ((i // 16 * 16 + c // 2) * 16 + i % 16) * 4 + c % 2 * 2
        v = head * 2 * half + half + ((c // 16 * (size // 2) + i // 2) * 16 + c % 16) * 4 + i % 2 * 2
        name = ((group.first_head + head) * 997 + t) * 32 + c
        memory[ids[t // size], k] = memory[ids[t // size], k + 1] = name % 251
        memory[ids[t // size], v] = memory[ids[t // size], v + 1] = name % 241


@pytest.mark.parametrize(("a", "b"), [(32, 128), (128, 32), (32, 32), (96, 64)])
@pytest.mark.parametrize(("p", "d"), [((2, 0), (1, 1)), ((1, 1), (2, 0)), ((2, 0), (2, 0))])
def test_blocks_packed_by_an_instruction_set(a: int, b: int, p: tuple[int, int], d: tuple[int, int]) -> None:
    tokens = 3 * max(a, b)
    owners = [packed(a, p[0], first, 2) for first in range(0, 2, p[0])]
    ours = packed(b, *d, 2)
    owners = [KVLayout(rank=n, groups=layout.groups) for n, layout in enumerate(owners)]
    (src_ids, src_blocks), (dst_ids, dst_blocks) = ids_of(tokens, a, 1), ids_of(tokens, b, 2)
    sources = []
    for layout in owners:
        memory = np.zeros((src_blocks, layout.groups[0].grid_bytes[0]), np.uint8)
        fill(layout, memory, src_ids, tokens)
        sources.append(Rank(layout, [memory]))
    target = Rank(ours, [np.zeros((dst_blocks, ours.groups[0].grid_bytes[0]), np.uint8)])
    wanted = target.grids[0].copy()
    fill(ours, wanted, dst_ids, tokens)
    for number, share in shares(ours, owners).items():
        resharding = Resharding(ours, owners[number], share)
        assert resharding.granule(0) == 16
        plans = [resharding.plan(0, src_ids, dst_ids, first, last) for first, last in ((0, 16), (16, tokens))]
        for plan in plans:
            execute(plan, sources[number], target)
        with pytest.raises(LocalProtocolError, match="packed by 16 tokens"):
            resharding.plan(0, src_ids, dst_ids, 0, 17)
    assert np.array_equal(target.grids[0], wanted)


# --- duties -----------------------------------------------------------------------------------------------------------


def layouts(heads: int, tp: int, pp: int = 1, kv: str = "head") -> list[KVLayout]:
    return [rank.layout for rank in instance(Shape(heads, 4, 1), Style(kv=kv), tp, pp, 1)]


@pytest.mark.parametrize("kv", ["head", LATENT])
@pytest.mark.parametrize(("p", "d"), list(itertools.product(itertools.product((1, 2, 4, 16), (1, 2, 4)), repeat=2)))
def test_every_owner_rank_is_ended_by_as_many_readers_as_it_is_told(
    p: tuple[int, int], d: tuple[int, int], kv: str
) -> None:
    owners, readers = layouts(4, *p, kv), layouts(4, *d, kv)
    all_duties = [duties(reader.rank, readers, owners) for reader in readers]
    assert all(each.readers == all_duties[0].readers for each in all_duties)
    for owner in owners:
        ending = sum((owner.rank in each.shares) + each.idle.count(owner.rank) for each in all_duties)
        assert ending == all_duties[0].readers[owner.rank] >= 1


def test_readers_spread_over_replicas() -> None:
    owners, readers = layouts(4, 8, kv=LATENT), layouts(4, 4, kv=LATENT)
    taken = [tuple(shares(reader, owners)) for reader in readers]
    assert taken == [(0,), (1,), (2,), (3,)]
    assert [duties(n, readers, owners).idle for n in range(4)] == [(4,), (5,), (6,), (7,)]


def test_what_nobody_has_is_named() -> None:
    short = [rank.layout for rank in instance(Shape(4, 3, 1), Style(kv="head"), 2, 1, 1)]
    with pytest.raises(LayoutMismatch, match=r"group 0: theirs hold nothing of layer layer\.3, which ours need"):
        shares(layouts(4, 1)[0], short)
    with pytest.raises(LayoutMismatch, match=r"nothing of 2 of 4 KV heads of layer layer\.0"):
        shares(layouts(4, 1)[0], layouts(4, 2)[:1])
    with pytest.raises(LayoutMismatch, match=r"group 0 layers: ours 4, theirs 3, missing there: layer\.3"):
        duties(0, layouts(4, 1), short)
    with pytest.raises(LayoutMismatch, match=r"group 0 layers: ours 3, theirs 4, only there: layer\.3"):
        duties(0, short, layouts(4, 1))
    assert list(shares(layouts(4, 2)[1], layouts(4, 2))) == [1]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "first", "last", "words"),
    [
        (Blocks([1], 16), Blocks([1], 16), 0, 17, "the source blocks hold 0 to 15"),
        (Blocks([1, 2], 16), Blocks([1], 16), 0, 17, "the destination blocks hold 0 to 15"),
        (Blocks([1, 2], 16, 16), Blocks([1], 16), 0, 8, "the source blocks hold 16 to 47"),
        (Blocks([], 16), Blocks([1], 16), 0, 8, "the source blocks hold none"),
        (Blocks([1, 2], 16), Blocks([3, 3], 16), 0, 32, "named twice"),
        (Blocks([1, 2], 32), Blocks([3, 4, 3, 5], 16), 0, 64, "named twice"),
        (Blocks([-1], 16), Blocks([3], 16), 0, 8, "source block ids must lie in"),
        (Blocks([1], 16), Blocks([2**32], 16), 0, 8, "destination block ids must lie in"),
    ],
)
def test_lists_that_do_not_serve(source: Blocks, target: Blocks, first: int, last: int, words: str) -> None:
    with pytest.raises(LocalProtocolError, match=words):
        overlay(source, target, first, last)


def test_the_size_of_a_plan_is_that_of_its_runs() -> None:
    """Scattered or not, and whatever the number of layers: patterns are made once."""
    ours, theirs = packed(128, 2, 0, 2), packed(16, 2, 0, 2)
    resharding = Resharding(ours, theirs, ((0, 2),))
    near = resharding.plan(0, np.arange(8000), np.arange(1000), 0, 128_000)
    assert len(near) == 8
    assert sum(len(plan.runs) for plan in near) == 8
    scattered = np.random.default_rng(1).permutation(8000)
    far = resharding.plan(0, scattered, np.arange(1000), 0, 128_000)
    assert 7900 < sum(len(plan.runs) for plan in far) <= 8000
    assert [a.patterns for a in near] == [b.patterns for b in far]
    assert all(a.patterns is b.patterns for a, b in zip(near, far, strict=True))


def of(rank: int, *groups: tuple[tuple[str, ...], int, int]) -> KVLayout:
    """A rank of 4 heads in all: per group its layers, first head and heads."""
    part = Part(name="kv", unit_bytes=2, token_stride=2, head_stride=32)
    return KVLayout(
        rank=rank,
        groups=tuple(
            GroupLayout(
                kind="full", block_tokens=16, heads=heads, first_head=first, total_heads=4, dtype="u8", layers=layers,
                forms=(Form(block_bytes=(32 * heads,), parts=(part,)),), form_of=(0,) * len(layers),
            )
            for layers, first, heads in groups
        ),
    )  # fmt: skip


def test_layers_that_are_held_in_parts_that_overlap_are_refused() -> None:
    owners = [of(0, (("x",), 0, 3)), of(1, (("x", "y"), 1, 3)), of(2, (("y",), 0, 1))]
    with pytest.raises(LayoutMismatch, match="in parts that overlap those of other layers"):
        shares(of(0, (("x", "y"), 0, 4)), owners)


def test_patterns_of_groups_are_told_apart() -> None:
    ours, theirs = of(0, (("a",), 0, 4), (("b", "c"), 0, 4)), of(0, (("a",), 0, 4), (("b", "c"), 0, 4))
    resharding = Resharding(ours, theirs, ((0, 4), (0, 4)))
    grids = [[p.dst_grid for p in resharding.plan(group, [1], [1], 0, 16)[0].patterns] for group in (0, 1)]
    assert grids == [[0], [1, 2]]


def test_every_unsupported_division_raises() -> None:
    """Without the help of heads_of_rank: by what the ranks themselves say."""
    whole = of(0, (("a",), 0, 4))
    for parts in ([(0, 2)], [(0, 1), (2, 2)], [(1, 3)], [(0, 3)]):
        owners = [of(n, (("a",), first, heads)) for n, (first, heads) in enumerate(parts)]
        with pytest.raises(LayoutMismatch, match=r"nothing of . of 4 KV heads"):
            duties(0, [whole], owners)


def test_stages_that_share_no_layer_of_a_group_do_not_disagree_about_it() -> None:
    one, other = of(0, (("a",), 0, 4), (("b",), 0, 4)), of(1, (("a",), 0, 4), (("c",), 0, 4))
    form = Form(block_bytes=(999,), parts=(Part(name="v", unit_bytes=3, token_stride=3),))
    odd = msgspec.structs.replace(other.groups[1], forms=(form,))
    assert one.diff(msgspec.structs.replace(other, groups=(other.groups[0], odd))) == []


def test_ranks_that_overlap_in_the_same_way_in_every_layer_are_read_once() -> None:
    owners = [of(0, (("a", "b"), 0, 3)), of(1, (("a", "b"), 1, 3))]
    assert shares(of(0, (("a", "b"), 0, 4)), owners) == {0: ((0, 3),), 1: ((3, 1),)}


def test_units_are_not_cut_at_their_beginning_either() -> None:
    resharding = Resharding(packed(128, 2, 0, 2), packed(32, 2, 0, 2), ((0, 2),))
    with pytest.raises(LocalProtocolError, match="packed by 16 tokens"):
        resharding.plan(0, [1, 2], [1], 8, 24)
