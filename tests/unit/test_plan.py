"""Planning: runs are the block pairs, as few as can be, and patterns cover each byte of a block once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import BlockGrid, GridRef, Region, order_grids
from pd_connector.plan import CopyPlan, Dim, Pattern, Place, coalesce, split_layers, whole_patterns

IDS = st.integers(0, 200) | st.integers(2**32 - 50, 2**32 - 1)


def unroll(plan_runs: np.ndarray) -> list[tuple[int, int]]:
    return [(src + k, dst + k) for src, dst, count in plan_runs.tolist() for k in range(count)]


@st.composite
def block_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    dst = draw(st.lists(IDS, unique=True, max_size=60))
    if draw(st.booleans()):
        dst.sort()
    if draw(st.booleans()):  # long runs, which independent draws hardly ever give
        start = draw(st.integers(0, 2**31))
        src = [start + each % 2**31 for each in dst]
    else:
        src = draw(st.lists(IDS, min_size=len(dst), max_size=len(dst)))
    return src, dst


@given(block_pairs())
def test_runs_are_the_pairs_in_order_of_destination(pairs: tuple[list[int], list[int]]) -> None:
    src, dst = pairs
    runs = coalesce(src, dst)
    assert runs.dtype == np.uint32
    assert runs.shape == (len(runs), 3)
    assert unroll(runs) == sorted(zip(src, dst, strict=True), key=lambda pair: pair[1])


@given(block_pairs())
def test_no_two_runs_could_be_one(pairs: tuple[list[int], list[int]]) -> None:
    runs = coalesce(*pairs).astype(np.int64)
    for first, second in pairwise(runs):
        assert (first[:2] + first[2]).tolist() != second[:2].tolist()


def test_blocks_that_an_engine_hands_out_last_one_first_are_one_run() -> None:
    assert coalesce(range(145, 113, -1), range(40, 8, -1)).tolist() == [[114, 9, 32]]


def test_one_source_may_go_to_several_destinations() -> None:
    assert unroll(coalesce([5, 5], [1, 2])) == [(5, 1), (5, 2)]


@pytest.mark.parametrize(
    ("src", "dst", "words"),
    [
        ([1], [], "1 source blocks but 0 destination"),
        ([1, 2], [3, 3], "twice"),
        ([-1], [0], "source block ids"),
        ([0], [2**32], "destination block ids"),
        ([2**70], [0], "source"),
        ([0.5], [0], "integers"),
        ([[1, 2]], [0], "flat"),
        (["a"], [0], "integers"),
        ([True], [0], "integers"),
    ],
)
def test_what_is_not_a_list_of_block_ids_is_refused(src: list[object], dst: list[object], words: str) -> None:
    with pytest.raises(LocalProtocolError, match=words):
        coalesce(src, dst)  # type: ignore[arg-type]


def test_arrays_are_as_good_as_lists() -> None:
    for dtype in (np.int32, np.uint32, np.int64, np.uint64):
        assert unroll(coalesce(np.array([3, 4], dtype), np.array([7, 8], dtype))) == [(3, 7), (4, 8)]


def grids() -> tuple[GridRef, ...]:
    """Group 0: two layers of K and V; group 1: one layer with fewer blocks."""
    regions = [
        Region(4096, 1 << 20, tuple(BlockGrid(0, 1, at * 4096, 64, 64, 20) for at in (0, 1))),
        Region(1 << 21, 1 << 20, (BlockGrid(0, 0, 0, 48, 32, 20), BlockGrid(1, 0, 4096, 16, 16, 8))),
        Region(1 << 22, 1 << 20, (BlockGrid(0, 0, 0, 32, 32, 16),)),
    ]
    return order_grids(regions)


def whole(src: list[int], dst: list[int]) -> CopyPlan:
    return CopyPlan(coalesce(src, dst), whole_patterns(grids(), 0))


def test_whole_blocks_of_a_group() -> None:
    plan = whole([9, 10, 3], [0, 1, 15])
    assert plan.runs.tolist() == [[9, 0, 2], [3, 15, 1]]
    assert plan.patterns == tuple(Pattern(index, index, 0, 0, size) for index, size in enumerate((32, 32, 64, 64)))
    assert (plan.num_blocks, plan.num_bytes) == (3, 3 * 192)
    assert whole_patterns(grids(), 1) == (Pattern(4, 4, 0, 0, 16),)
    assert whole_patterns(grids(), 2) == ()


def test_nothing_to_read_is_a_plan_too() -> None:
    plan = whole([], [])
    assert (plan.num_blocks, plan.num_bytes, plan.runs.shape) == (0, 0, (0, 3))


def test_split_by_layer_keeps_every_pattern_once() -> None:
    plan = whole([1, 2, 3], [4, 5, 6])
    layers = [layer for (layer,) in split_layers([plan], grids())]
    assert [sorted({grids()[p.dst_grid].grid.layer for p in layer.patterns}) for layer in layers] == [[0], [1]]
    assert sum((layer.patterns for layer in layers), ()) == plan.patterns
    assert all(layer.runs is plan.runs for layer in layers)
    assert sum(layer.num_bytes for layer in layers) == plan.num_bytes
    assert split_layers([CopyPlan(plan.runs, ())], grids()) == []
    assert [len(layer) for layer in split_layers([plan, plan], grids())] == [2, 2]


def test_sides_and_sizes_of_what_is_strided() -> None:
    pattern = Pattern(1, 2, 10, 20, 4, (Dim(3, 100, 8), Dim(2, 50, 4)))
    plan = CopyPlan(np.array([[5, 7, 3]], np.uint32), (pattern,), 2, 1)
    assert plan.num_bytes == 3 * 24
    assert plan.side(0).blocks.tolist() == [5, 7, 9]
    assert plan.side(1).blocks.tolist() == [7, 8, 9]
    assert plan.side(0).places == (Place(1, 10, 4, ((3, 100), (2, 50))),)
    assert (pattern.src_span, pattern.dst_span) == (254, 24)


@given(st.integers(1, 2**32 - 1), st.integers(1, 2**20))
def test_sizes_do_not_overflow(count: int, size: int) -> None:
    plan = CopyPlan(np.array([[0, 0, count]] * 3, np.uint32), (Pattern(0, 0, 0, 0, size),) * 2)
    assert plan.num_blocks == 3 * count
    assert plan.num_bytes == 6 * count * size
