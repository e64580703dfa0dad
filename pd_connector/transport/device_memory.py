"""Registered memory of a device as moves: from where its blocks lie to a slot of host memory, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import Pattern
from pd_connector.transport.device import Moves
from pd_connector.transport.grids import GridTable
from pd_connector.transport.slices import Blocks, Part, Slice

MOST_MOVES = 1 << 16
"""Of short runs in one array; so many take 1.5 MiB."""

Addresses = npt.NDArray[np.int64]


class DeviceMemory(GridTable):
    """Raises LocalProtocolError for regions of more than one kind. Keeps the owners of the memory alive."""

    def __init__(self, regions: Sequence[Region]) -> None:
        super().__init__(regions)
        kinds = sorted({region.kind for region in regions})
        if len(kinds) > 1:
            raise LocalProtocolError(
                f"regions of {' and '.join(kinds)} memory cannot be registered together: one device moves all of it"
            )
        self.kind: MemoryKind | None = kinds[0] if kinds else None
        self._regions = tuple(regions)
        self._base = [regions[ref.region].address + ref.grid.offset for ref in self._refs]

    def load(self, blocks: Blocks, parts: Sequence[Part], slot: int) -> Moves:
        """The stream of a slice, to the slot at this address."""
        places, sizes, regions = self._pieces(blocks, parts)
        return _merge(_stream(sizes, slot), places, sizes, regions)

    def place(self, piece: Slice, slot: int) -> Iterator[Moves]:
        """From the slot to where a slice's bytes belong."""
        if not piece.patterns:
            places, sizes, regions = self._pieces(piece.dst_blocks, piece.dst_parts)
            yield _merge(places, _stream(sizes, slot), sizes, regions)
            return
        for pattern in piece.patterns:
            yield from self._scatter(piece.dst_blocks, pattern, slot)
            slot += len(piece.dst_blocks) * pattern.src_span

    def _scatter(self, blocks: Blocks, pattern: Pattern, slot: int) -> Iterator[Moves]:
        """Runs out of spans that lie one behind the other from ``slot`` on."""
        grid = self._grids[pattern.dst_grid]
        src = _offsets((times, stride) for times, stride, _ in pattern.dims)
        dst = _offsets((times, stride) for times, _, stride in pattern.dims)
        dst += self._base[pattern.dst_grid] + pattern.dst_offset
        step = max(1, MOST_MOVES // len(src))
        for at in range(0, len(blocks), step):
            some = blocks[at : at + step].astype(np.int64)
            spans = slot + (at + np.arange(len(some), dtype=np.int64)) * pattern.src_span
            sources = np.add.outer(spans, src).reshape(-1)
            targets = np.add.outer(some * grid.block_stride, dst).reshape(-1)
            sizes = np.full(len(sources), pattern.run_bytes, np.int64)
            yield _merge(targets, sources, sizes, np.zeros_like(sizes))

    def _pieces(self, blocks: Blocks, parts: Sequence[Part]) -> tuple[Addresses, Addresses, Addresses]:
        """Address, size and region of every piece of a stream, in its order."""
        ids = blocks.astype(np.int64)
        table = np.array(
            [(self._base[g] + at, self._grids[g].block_stride, size, self._refs[g].region) for g, at, size in parts],
            np.int64,
        )
        places = (ids * table[:, 1:2] + table[:, :1]).reshape(-1)
        return places, np.repeat(table[:, 2], len(ids)), np.repeat(table[:, 3], len(ids))


def _stream(sizes: Addresses, slot: int) -> Addresses:
    return slot + np.cumsum(sizes) - sizes


def _offsets(dims: Iterable[tuple[int, int]]) -> Addresses:
    """How far every place of the dimensions lies from the first, outermost dimension first."""
    out = np.zeros(1, np.int64)
    for times, stride in dims:
        out = np.add.outer(out, np.arange(times, dtype=np.int64) * stride).reshape(-1)
    return out


def _merge(dst: Addresses, src: Addresses, sizes: Addresses, regions: Addresses) -> Moves:
    """Moves, neighbours on both sides joined unless they lie in different regions."""
    apart = (dst[1:] != dst[:-1] + sizes[:-1]) | (src[1:] != src[:-1] + sizes[:-1]) | (regions[1:] != regions[:-1])
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    return np.stack((dst[first], src[first], np.add.reduceat(sizes, first)), 1).astype(np.uint64)
