"""Resharding: pure planning between an owner rank and a reader rank that need not be alike.

Token ranges address KV, never positions in a list. A range is laid over the blocks of both sides; where the block sizes
differ, each *segment* between two block bounds of either side comes back every lcm of the sizes, so all segments of one
kind make runs with a step, and the number of plans depends on the sizes alone. What a segment means in bytes (which
heads, units and chunks) is worked out once per pair of ranks and kind of segment, and shared by all transfers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LayoutMismatch, LocalProtocolError
from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.plan import CopyPlan, Dim, Ids, Pattern, Runs, block_ids, merge

_MAX_SEGMENTS = 4096
"""Kinds of segments whose patterns are kept; odd ends of token ranges make new ones."""


class Segment(NamedTuple):
    """``tokens`` tokens from token ``src`` of a source block on, to ``dst`` of a destination block."""

    src: int
    dst: int
    tokens: int


class Overlay(NamedTuple):
    """Where one kind of segment occurs."""

    segment: Segment
    runs: Runs
    src_step: int
    dst_step: int


class Blocks(NamedTuple):
    """Block ids of one side: those from token ``start`` on (a multiple of ``tokens``, the block size)."""

    ids: Ids
    tokens: int
    start: int = 0


def overlay(source: Blocks, target: Blocks, first: int, last: int) -> list[Overlay]:
    """Tokens ``first`` to ``last - 1`` from source blocks into target blocks.

    Raises LocalProtocolError for lists that do not cover the range, ids that cannot be, or a destination block that is
    named twice (two writers of one block could leave either one's bytes)."""
    if first >= last:
        return []
    src, dst = _covering(source, first, last, "source"), _covering(target, first, last, "destination")
    a, b = source.tokens, target.tokens
    if a == b and not first % a and not last % a:  # the usual case, of which small transfers feel every step
        return [_alike(src, dst, a)]
    _check_once(np.sort(dst))
    both = math.lcm(a, b)
    bounds = _bounds(a, b, first, last)
    starts = bounds[:-1]
    src, dst = src[starts // a - first // a], dst[starts // b - first // b]
    # A segment that the range cuts short is of a kind of its own.
    head, tail = bool(first % a and first % b), bool(last % a and last % b)
    count = len(starts)
    if head and tail and count == 1:
        tail = False
    out = []
    for at in [0] * head + [count - 1] * tail:
        start, end = int(bounds[at]), int(bounds[at + 1])
        runs = np.array([[src[at], dst[at], 1]], np.uint32)
        out.append(Overlay(Segment(start % a, start % b, end - start), runs, 1, 1))
    whole = slice(int(head), count - int(tail))
    if whole.start < whole.stop:
        out.extend(_kinds(src[whole], dst[whole], bounds[whole.start : whole.stop + 1], a, b, both))
    return out


def _alike(src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], tokens: int) -> Overlay:
    """Whole blocks of one size."""
    order = np.argsort(dst)
    src, dst = src[order], dst[order]
    _check_once(dst)
    return Overlay(Segment(0, 0, tokens), merge(src, dst), 1, 1)


def _check_once(ordered: npt.NDArray[np.int64]) -> None:
    if (ordered[1:] == ordered[:-1]).any():
        raise LocalProtocolError("a destination block is named twice in one transfer")


def _covering(side: Blocks, first: int, last: int, name: str) -> npt.NDArray[np.int64]:
    """The ids of the blocks that the range touches."""
    skip, need = first // side.tokens - side.start // side.tokens, -(-last // side.tokens)
    ids = block_ids(side.ids, name)
    wanted = ids[max(skip, 0) : need - side.start // side.tokens]
    if skip < 0 or len(wanted) < need - first // side.tokens:
        have = f"{side.start} to {side.start + len(ids) * side.tokens - 1}" if len(ids) else "none"
        raise LocalProtocolError(f"tokens {first} to {last - 1} are wanted, the {name} blocks hold {have}")
    return wanted


def _bounds(a: int, b: int, first: int, last: int) -> npt.NDArray[np.int64]:
    """``first``, every block bound of either side within, and ``last``."""
    small, large = min(a, b), max(a, b)
    inner = np.arange(first // small * small + small, last, small, dtype=np.int64)
    if large % small:
        inner = np.union1d(inner, np.arange(first // large * large + large, last, large, dtype=np.int64))
    return np.concatenate(([first], inner, [last]))


def _kinds(src: Any, dst: Any, bounds: Any, a: int, b: int, both: int) -> list[Overlay]:
    """Overlays of segments between natural bounds, by their phase in the common period of the block sizes."""
    phase = bounds[:-1] % both
    if a == b:
        return [_alike(src, dst, a)]
    order = np.argsort(phase * 2**32 + dst)
    lengths = np.diff(bounds)[order]
    src, dst, phase = src[order], dst[order], phase[order]
    cuts = np.flatnonzero(np.diff(phase)) + 1
    out = []
    for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(phase)], strict=True):
        at = int(phase[low])
        runs = merge(src[low:high], dst[low:high], both // a, both // b)
        out.append(Overlay(Segment(at % a, at % b, int(lengths[low])), runs, both // a, both // b))
    return out


# --- what a segment means in bytes ------------------------------------------------------------------------------------

Heads = tuple[int, int]
"""(first head, heads) of the model that are read."""
Share = tuple[Heads | None, ...]
"""Per group what a reader reads from one owner rank; None: nothing."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A pattern without layer: grids are counted within the layer."""

    src_grid: int
    dst_grid: int
    src_offset: int
    dst_offset: int
    run_bytes: int
    dims: tuple[Dim, ...]


class Resharding:
    """Plans reads of ``share`` from an owner rank of layout ``theirs`` into our rank of layout ``ours``.

    Raises LayoutMismatch, with the diff, for a pair that cannot exchange blocks."""

    def __init__(self, ours: KVLayout, theirs: KVLayout, share: Share) -> None:
        if diff := ours.diff(theirs):
            raise LayoutMismatch(f"ranks {ours.rank} of ours and {theirs.rank} of theirs cannot exchange blocks", diff)
        self.ours, self.theirs, self.share = ours, theirs, share
        self._first = [_first_grids(layout) for layout in (theirs, ours)]
        self._patterns: dict[tuple[int, Segment], tuple[Pattern, ...]] = {}

    def granule(self, group: int) -> int:
        """Token ranges of a group must begin and end at multiples of this."""
        return math.lcm(*(part.unit_tokens for form in self.ours.groups[group].forms for part in form.parts))

    def plan(
        self, group: int, src_ids: Ids, dst_ids: Ids, first: int, last: int, src_start: int = 0, dst_start: int = 0
    ) -> list[CopyPlan]:
        """Tokens ``first`` to ``last - 1`` of a group; the ids are of blocks from token ``src_start`` and ``dst_start``
        on. Raises LocalProtocolError as ``overlay`` does, and for a range that cuts a unit of tokens."""
        if self.share[group] is None:
            return []
        a, b = self.theirs.groups[group], self.ours.groups[group]
        source, target = Blocks(src_ids, a.block_tokens, src_start), Blocks(dst_ids, b.block_tokens, dst_start)
        return self.apply(group, overlay(source, target, first, last))

    def apply(self, group: int, found: Sequence[Overlay]) -> list[CopyPlan]:
        """The plans of an overlay, which is the same for every owner rank of one block size."""
        return [CopyPlan(each.runs, self.patterns(group, each.segment), each.src_step, each.dst_step) for each in found]

    def patterns(self, group: int, segment: Segment) -> tuple[Pattern, ...]:
        key = (group, segment)
        if (known := self._patterns.get(key)) is None:
            if len(self._patterns) >= _MAX_SEGMENTS:
                self._patterns.clear()
            known = self._patterns[key] = self._make_patterns(group, segment)
        return known

    def _make_patterns(self, group: int, segment: Segment) -> tuple[Pattern, ...]:
        heads = self.share[group]
        assert heads is not None, "nothing of this group is read from this rank"
        granule = self.granule(group)
        if any(value % granule for value in segment):
            raise LocalProtocolError(f"{segment}: blocks of group {group} are packed by {granule} tokens")
        a, b = self.theirs.groups[group], self.ours.groups[group]
        position = {layer: index for index, layer in enumerate(a.layers)}
        src_first, dst_first = (firsts[group] for firsts in self._first)
        out: list[Pattern] = []
        known: dict[tuple[int, int], list[_Shape]] = {}
        for index, layer in enumerate(b.layers):
            if (there := position.get(layer)) is None:
                continue
            pair = a.form_of[there], b.form_of[index]
            if pair not in known:
                known[pair] = _shapes(a, b, a.forms[pair[0]], b.forms[pair[1]], heads, segment)
            src, dst = src_first[there], dst_first[index]
            out.extend(
                Pattern(src + one.src_grid, dst + one.dst_grid, one.src_offset, one.dst_offset, one.run_bytes, one.dims)
                for one in known[pair]
            )
        return tuple(out)


def _first_grids(layout: KVLayout) -> list[list[int]]:
    """Per group and layer the canonical number of the layer's first grid."""
    at, out = 0, []
    for group in layout.groups:
        firsts = []
        for form in group.form_of:
            firsts.append(at)
            at += len(group.forms[form].block_bytes)
        out.append(firsts)
    return out


def _shapes(a: GroupLayout, b: GroupLayout, src: Form, dst: Form, heads: Heads, segment: Segment) -> list[_Shape]:
    first, count = heads
    same_heads = (a.first_head, a.heads) == (b.first_head, b.heads) == heads
    if same_heads and src == dst and segment == (0, 0, a.block_tokens) == (0, 0, b.block_tokens):
        return [_Shape(grid, grid, 0, 0, size, ()) for grid, size in enumerate(src.block_bytes)]
    theirs = {part.name: part for part in src.parts}
    at = first - a.first_head, first - b.first_head
    return _join([_shape(theirs[part.name], part, at, count, segment) for part in dst.parts])


def _shape(src: Part, dst: Part, first: tuple[int, int], heads: int, segment: Segment) -> _Shape:
    unit = src.unit_tokens
    dims = [
        Dim(heads, src.head_stride, dst.head_stride),
        Dim(segment.tokens // unit, src.token_stride, dst.token_stride),
        Dim(src.chunks, src.chunk_stride, dst.chunk_stride),
    ]
    src_offset = src.offset + first[0] * src.head_stride + segment.src // unit * src.token_stride
    dst_offset = dst.offset + first[1] * dst.head_stride + segment.dst // unit * dst.token_stride
    return _Shape(src.grid, dst.grid, src_offset, dst_offset, *_collapse(src.unit_bytes, dims))


def _collapse(run: int, dims: Sequence[Dim]) -> tuple[int, tuple[Dim, ...]]:
    """The longest runs and the fewest repetitions of the same bytes, outermost repetition first."""
    left = [dim for dim in dims if dim.times > 1]
    while near := [dim for dim in left if dim.src_stride == dim.dst_stride == run]:
        run *= near[0].times
        left.remove(near[0])
    left.sort(key=lambda dim: -dim.dst_stride)
    out: list[Dim] = []
    for dim in left:
        if out and (out[-1].src_stride, out[-1].dst_stride) == (dim.times * dim.src_stride, dim.times * dim.dst_stride):
            dim = Dim(out.pop().times * dim.times, dim.src_stride, dim.dst_stride)
        out.append(dim)
    return run, tuple(out)


def _join(shapes: list[_Shape]) -> list[_Shape]:
    """Shapes that lie side by side on both sides (K and V of a head, say) become one."""
    out: list[_Shape] = []
    for one in sorted(shapes, key=lambda shape: (shape.dst_grid, shape.dst_offset)):
        before = out[-1] if out else None
        if (
            before is not None
            and (before.src_grid, before.dst_grid, before.dims) == (one.src_grid, one.dst_grid, one.dims)
            and one.src_offset - before.src_offset == before.run_bytes == one.dst_offset - before.dst_offset
        ):
            run, dims = _collapse(before.run_bytes + one.run_bytes, before.dims)
            out[-1] = _Shape(one.src_grid, one.dst_grid, before.src_offset, before.dst_offset, run, dims)
        else:
            out.append(one)
    return out
