"""Registered host memory as an owner reads and a reader writes it, addressed by block id, grid and byte offset."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.memory import MemoryKind, Region, copier, order_grids
from pd_connector.plan import MAX_DIMS, CopyPlan, Pattern
from pd_connector.transport.slices import Blocks, Part, Slice

GATHER_BELOW = 32768
"""Mean bytes per contiguous segment under which one copy by numpy costs less than one frame per segment."""

Buffer = npt.NDArray[np.uint8]


class HostMemory:
    """Raises LocalProtocolError for a region that is not host memory.

    Inside, a byte is named by its *position*: regions laid end to end with a gap of one between them, so that two
    segments touch only if they are neighbours in one region.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.kind is not MemoryKind.HOST:
                raise LocalProtocolError(f"{region}: this transport reaches host memory only")
        self._bytes = [np.frombuffer(region.view(), np.uint8) for region in regions]
        self._first = [0]
        for region in regions:
            self._first.append(self._first[-1] + region.length + 1)
        self._refs = order_grids(regions)
        self._grids = [ref.grid for ref in self._refs]
        self._base = [self._first[ref.region] + ref.grid.offset for ref in self._refs]

    def groups(self, parts: Iterable[Part]) -> set[int]:
        """KV cache groups that these parts belong to."""
        return {self._grids[grid].group for grid, _, _ in parts}

    def fault(self, last_block: int, parts: Iterable[Part]) -> str | None:
        """What is wrong with an address, or None; nothing else here checks."""
        for index, offset, size in parts:
            if not 0 <= index < len(self._grids):
                return f"grid {index} does not exist, there are {len(self._grids)}"
            grid = self._grids[index]
            if offset < 0 or size < 1 or offset + size > grid.block_bytes:
                return f"{size} bytes at {offset} do not lie in the blocks of grid {index} ({grid.block_bytes} bytes)"
            if last_block >= grid.num_blocks:
                return f"block {last_block} does not exist, grid {index} has {grid.num_blocks}"
        return None

    def check_plan(self, plan: CopyPlan) -> None:
        """Raises LocalProtocolError unless every destination byte of the plan lies in a block registered here and its
        source is one that some owner could have."""
        runs = plan.runs
        if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.uint32:
            raise LocalProtocolError(f"runs must be uint32 of shape (n, 3), got {runs.dtype} of {runs.shape}")
        if not len(runs) or not plan.patterns:
            return
        if int(runs[:, 2].min()) < 1:
            raise LocalProtocolError("a run of a plan has no blocks")
        if any(map(_impossible, plan.patterns)) or min(plan.src_step, plan.dst_step) < 1:
            raise LocalProtocolError("a pattern of the plan has an impossible source grid, offset or dimension")
        # The highest id is enough, and costs nothing like expanding a run of 2**32 blocks.
        wide = runs.astype(np.int64)
        if int((wide[:, 0] + (wide[:, 2] - 1) * plan.src_step).max()) >= 2**32:
            raise LocalProtocolError("a run of the plan ends beyond block 2**32-1 of its source")
        last = int((wide[:, 1] + (wide[:, 2] - 1) * plan.dst_step).max())
        fault = self.fault(last, [(p.dst_grid, p.dst_offset, p.dst_span) for p in plan.patterns])
        if fault is not None:
            raise LocalProtocolError(f"the plan does not fit the memory registered here: {fault}")
        limit = min(self._grids[pattern.dst_grid].num_blocks for pattern in plan.patterns)
        if plan.num_blocks > limit:
            raise LocalProtocolError(f"the plan writes {plan.num_blocks} blocks into {limit}: one is named twice")

    def load(self, blocks: Blocks, parts: Sequence[Part]) -> list[Buffer]:
        """The stream of a slice: views of block memory, or one gathered copy when the pieces are small."""
        segments = self._segments(blocks, parts)
        if segments is not None:
            return segments
        out = _empty(blocks, parts)
        for rows, stream in self._rows(blocks, parts, out):
            stream[:] = rows[blocks]
        return [out]

    def place(self, piece: Slice, stream: Iterable[Buffer]) -> None:
        """Write a slice's stream as it comes. Raises RemoteProtocolError when it is shorter or longer than the slice,
        having written nothing outside of it."""
        if not piece.patterns:
            self.store(piece.dst_blocks, piece.dst_parts, stream)
            return
        whole = np.empty(piece.num_bytes, np.uint8)
        _fill([whole], stream)
        at = 0
        for pattern in piece.patterns:
            end = at + len(piece.dst_blocks) * pattern.src_span
            self._scatter(piece.dst_blocks, pattern, whole[at:end])
            at = end

    def _scatter(self, blocks: Blocks, pattern: Pattern, spans: Buffer) -> None:
        ref, counts = self._refs[pattern.dst_grid], [dim.times for dim in pattern.dims]
        base = self._bytes[ref.region][ref.grid.offset + pattern.dst_offset :]
        strides = [dim.dst_stride for dim in pattern.dims]
        rows = as_strided(base, (ref.grid.num_blocks, *counts, pattern.run_bytes), (ref.grid.block_stride, *strides, 1))
        strides = [dim.src_stride for dim in pattern.dims]
        rows[blocks] = as_strided(spans, (len(blocks), *counts, pattern.run_bytes), (pattern.src_span, *strides, 1))

    def store(self, blocks: Blocks, parts: Sequence[Part], stream: Iterable[Buffer]) -> None:
        """Write a stream piece by piece as it comes; its cuts need not fall on ours.

        Raises RemoteProtocolError when it is shorter or longer than the slice, having written nothing outside of it.
        """
        segments = self._segments(blocks, parts)
        if segments is not None:
            _fill(segments, stream)
            return
        whole = _empty(blocks, parts)
        _fill([whole], stream)
        for rows, piece in self._rows(blocks, parts, whole):
            rows[blocks] = piece

    def _segments(self, blocks: Blocks, parts: Sequence[Part]) -> list[Buffer] | None:
        """Views in stream order, neighbours in memory merged; None when they are small on average."""
        ids = blocks.astype(np.int64)
        if len(parts) == 1:
            grid, offset, size = parts[0]
            starts = ids * self._grids[grid].block_stride + (self._base[grid] + offset)
            ends = starts + size
        else:
            table = np.array([(self._base[g] + offset, self._grids[g].block_stride, size) for g, offset, size in parts])
            starts = (ids * table[:, 1:2] + table[:, :1]).reshape(-1)
            ends = starts + np.repeat(table[:, 2], len(ids))
        apart = np.flatnonzero(starts[1:] != ends[:-1])
        count = len(apart) + 1
        if len(blocks) * sum(size for _, _, size in parts) < count * GATHER_BELOW:
            return None
        if count < len(starts):
            starts, ends = np.append(starts[:1], starts[apart + 1]), np.append(ends[apart], ends[-1:])
        views = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            region = bisect_right(self._first, start) - 1
            first = self._first[region]
            views.append(self._bytes[region][start - first : end - first])
        return views

    def _rows(
        self, blocks: Blocks, parts: Iterable[Part], stream: Buffer
    ) -> Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Per part: its bytes in all blocks of the grid, shape (grid blocks, bytes), and its share of the stream."""
        at = 0
        for index, offset, size in parts:
            ref = self._refs[index]
            base = self._bytes[ref.region][ref.grid.offset :]
            whole = as_strided(base, (ref.grid.num_blocks, ref.grid.block_bytes), (ref.grid.block_stride, 1))
            end = at + len(blocks) * size
            yield whole[:, offset : offset + size], stream[at:end].reshape(len(blocks), size)
            at = end


def _impossible(pattern: Pattern) -> bool:
    sizes = [pattern.src_grid, pattern.src_offset, *(value for dim in pattern.dims for value in dim)]
    counts = [dim.times for dim in pattern.dims]
    return (
        len(counts) > MAX_DIMS
        or min(sizes) < 0
        or min(counts, default=1) < 1
        or pattern.num_bytes > pattern.dst_span  # more would be written over
        or max(pattern.src_grid, pattern.src_offset, pattern.src_span, pattern.num_bytes) >= 2**48
    )


def _empty(blocks: Blocks, parts: Iterable[Part]) -> Buffer:
    return np.empty(len(blocks) * sum(size for _, _, size in parts), np.uint8)


def _fill(targets: Iterable[Buffer], stream: Iterable[Buffer]) -> None:
    copy = copier()
    left = iter(targets)
    target = next(left)
    for piece in stream:
        while len(piece):
            if not len(target):
                try:
                    target = next(left)
                except StopIteration:
                    raise RemoteProtocolError(f"a slice came with at least {len(piece)} bytes too many") from None
            size = min(len(piece), len(target))
            copy(target[:size], piece[:size])
            piece, target = piece[size:], target[size:]
    missing = len(target) + sum(map(len, left))
    if missing:
        raise RemoteProtocolError(f"a slice came {missing} bytes short")
