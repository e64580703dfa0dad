"""Registered host memory as an owner reads and a reader writes it, addressed by block id, grid and byte offset."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.memory import MemoryKind, Region, copier
from pd_connector.plan import Pattern
from pd_connector.transport.grids import GridTable
from pd_connector.transport.slices import Blocks, Part, Slice

GATHER_BELOW = 32768
"""Mean bytes per contiguous segment under which one copy by numpy costs less than one frame per segment."""

Buffer = npt.NDArray[np.uint8]


class HostMemory(GridTable):
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
        super().__init__(regions)
        self._base = [self._first[ref.region] + ref.grid.offset for ref in self._refs]

    def load(self, blocks: Blocks, parts: Sequence[Part]) -> list[Buffer]:
        """The stream of a slice: views of block memory, or one gathered copy when the pieces are small."""
        segments = self._segments(blocks, parts)
        if segments is not None:
            return segments
        out = _empty(blocks, parts)
        for rows, stream in self._rows(blocks, parts, out):
            stream[:] = rows[blocks]
        return [out]

    def places(self, piece: Slice) -> list[Buffer] | None:
        """Where the stream of a slice goes, in its order; None if in so many places that it is to be gathered first,
        for ``put``."""
        return None if piece.patterns else self._segments(piece.dst_blocks, piece.dst_parts)

    def put(self, piece: Slice, whole: Buffer) -> None:
        """Write the gathered stream of a slice to its places."""
        at = 0
        for pattern in piece.patterns:
            end = at + len(piece.dst_blocks) * pattern.src_span
            self._scatter(piece.dst_blocks, pattern, whole[at:end])
            at = end
        if not piece.patterns:
            for rows, part in self._rows(piece.dst_blocks, piece.dst_parts, whole):
                rows[piece.dst_blocks] = part

    def place(self, piece: Slice, stream: Iterable[Buffer]) -> None:
        """Write a slice's stream, cut into whatever pieces.

        Raises RemoteProtocolError when it is shorter or longer than the slice, having written nothing outside of it.
        """
        places = self.places(piece)
        if places is not None:
            _fill(places, stream)
            return
        whole = np.empty(piece.num_bytes, np.uint8)
        _fill([whole], stream)
        self.put(piece, whole)

    def _scatter(self, blocks: Blocks, pattern: Pattern, spans: Buffer) -> None:
        ref, counts = self._refs[pattern.dst_grid], [dim.times for dim in pattern.dims]
        base = self._bytes[ref.region][ref.grid.offset + pattern.dst_offset :]
        strides = [dim.dst_stride for dim in pattern.dims]
        rows = as_strided(base, (ref.grid.num_blocks, *counts, pattern.run_bytes), (ref.grid.block_stride, *strides, 1))
        strides = [dim.src_stride for dim in pattern.dims]
        rows[blocks] = as_strided(spans, (len(blocks), *counts, pattern.run_bytes), (pattern.src_span, *strides, 1))

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
