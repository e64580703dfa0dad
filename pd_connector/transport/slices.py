"""A read cut into slices: what one request asks for, small enough that cancel, fence and other reads never wait long.

A slice is block ids × *parts*; a part is (grid, byte offset in the block, bytes). Its byte stream runs part by part,
within a part block by block: both sides expand it alike, so no descriptor per chunk ever travels. Runs too short to be
asked for one by one come as whole *spans* of the source blocks, and are put in their places by the reader.

A slice is handled while its bytes wash everything else out of the caches, where a numpy call costs tens of
microseconds. Hence plain tuples for parts, of which there are few, and arrays only for blocks and chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd_connector.plan import CopyPlan, Pattern

SLICE_BYTES = 4 << 20
SLICE_CHUNKS = 8192
"""Bound on blocks × parts of one slice."""
SLICE_PARTS = 1024
DIRECT_BYTES = 2048
"""Shorter runs cost more to ask for one by one than all that lies between them."""

Blocks = npt.NDArray[np.uint32]
Part = tuple[int, int, int]
"""Grid in canonical order, byte offset within the block, bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """``num_bytes`` come. They go to ``dst_parts``, or, if they are spans, to the places of ``patterns``."""

    src_blocks: Blocks
    dst_blocks: Blocks
    src_parts: tuple[Part, ...]
    dst_parts: tuple[Part, ...]
    num_bytes: int
    patterns: tuple[Pattern, ...] = ()


def comes_as_span(pattern: Pattern, most: int = SLICE_BYTES) -> bool:
    return bool(pattern.dims) and pattern.run_bytes < DIRECT_BYTES and pattern.src_span <= most


def stream_bytes(plan: CopyPlan, most: int = SLICE_BYTES) -> int:
    """Bytes of all slices of a plan."""
    return plan.num_blocks * sum(p.src_span if comes_as_span(p, most) else p.num_bytes for p in plan.patterns)


def cut(plan: CopyPlan, most: int = SLICE_BYTES) -> Iterator[Slice]:
    """Slices of at most ``most`` bytes and within the other two bounds above, in pattern order, lazily."""
    src, dst = plan.blocks(0), plan.blocks(1)
    if not len(src):
        return
    for spans, patterns in itertools.groupby(plan.patterns, lambda pattern: comes_as_span(pattern, most)):
        some = tuple(patterns)
        if spans:
            src_parts = tuple((p.src_grid, p.src_offset, p.src_span) for p in some)
            for pieces, parts in _cut_parts(len(src), src_parts, most):
                size = len(src[pieces]) * sum(size for _, _, size in src_parts[parts])
                yield Slice(src[pieces], dst[pieces], src_parts[parts], (), size, some[parts])
        else:
            yield from _cut_runs(src, dst, some, most)


def _cut_runs(src: Blocks, dst: Blocks, patterns: Sequence[Pattern], most: int) -> Iterator[Slice]:
    places = [(p, place) for p in patterns for place in _places(p)]
    src_parts = tuple((p.src_grid, p.src_offset + at, p.run_bytes) for p, (at, _) in places)
    dst_parts = tuple((p.dst_grid, p.dst_offset + at, p.run_bytes) for p, (_, at) in places)
    for pieces, parts in _cut_parts(len(src), src_parts, most):
        a, b = src_parts[parts], dst_parts[parts]
        if a[0][2] > most:
            yield from _cut_blocks(src[pieces], dst[pieces], a[0], b[0], most)
        else:
            yield Slice(src[pieces], dst[pieces], a, b, len(src[pieces]) * sum(size for _, _, size in a))


def _places(pattern: Pattern) -> list[tuple[int, int]]:
    """How far on each side every place of the dimensions lies from the first."""
    out = [(0, 0)]
    for count, src_stride, dst_stride in pattern.dims:
        out = [(src + i * src_stride, dst + i * dst_stride) for src, dst in out for i in range(count)]
    return out


def _cut_parts(blocks: int, parts: Sequence[Part], most_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(some of the blocks, some of the parts) of each slice; a part that exceeds one is alone, with all blocks."""
    index = 0
    while index < len(parts):
        size = parts[index][2]
        fit = min(most_bytes // size, SLICE_CHUNKS)  # blocks of this part in one slice
        if fit == 0:
            yield slice(0, blocks), slice(index, index + 1)
            index += 1
        elif fit < blocks:
            for at in range(0, blocks, fit):
                yield slice(at, at + fit), slice(index, index + 1)
            index += 1
        else:
            stop, total = index, 0
            most = index + min(SLICE_PARTS, SLICE_CHUNKS // blocks)
            while stop < min(len(parts), most) and total + blocks * parts[stop][2] <= most_bytes:
                total += blocks * parts[stop][2]
                stop += 1
            yield slice(0, blocks), slice(index, stop)
            index = stop


def _cut_blocks(src: Blocks, dst: Blocks, src_part: Part, dst_part: Part, most: int) -> Iterator[Slice]:
    """A part so large that one block of it takes several slices."""
    for at in range(len(src)):
        for offset in range(0, src_part[2], most):
            size = min(most, src_part[2] - offset)
            source = (src_part[0], src_part[1] + offset, size)
            target = (dst_part[0], dst_part[1] + offset, size)
            yield Slice(src[at : at + 1], dst[at : at + 1], (source,), (target,), size)
