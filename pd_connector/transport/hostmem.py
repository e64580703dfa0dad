"""Registered host memory as an owner reads and a reader writes it, addressed by block id, grid and byte offset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import MemoryKind, Region, order_grids
from pd_connector.plan import CopyPlan
from pd_connector.transport.slices import Blocks, Parts

GATHER_BELOW = 32768
"""Mean bytes per contiguous segment under which one copy by numpy costs less than one frame per segment."""

Buffer = npt.NDArray[np.uint8]
Spans = npt.NDArray[np.int64]


class HostMemory:
    """Raises LocalProtocolError for a region that is not host memory."""

    def __init__(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.kind is not MemoryKind.HOST:
                raise LocalProtocolError(f"{region}: this transport reaches host memory only; use a staged transport")
        self._bytes = [np.frombuffer(region.view(), np.uint8) for region in regions]
        self.grids = order_grids(regions)
        rows = [
            (
                ref.region,
                ref.grid.offset,
                ref.grid.block_stride,
                ref.grid.block_bytes,
                ref.grid.num_blocks,
                ref.grid.group,
            )
            for ref in self.grids
        ]
        table = np.array(rows, np.int64).reshape(-1, 6)
        self._region, self._offset, self._stride, self._block_bytes, self._num_blocks, self.groups = table.T

    def fault(self, blocks: Blocks | npt.NDArray[np.int64], parts: Parts) -> str | None:
        """What is wrong with an address, or None; nothing else here checks."""
        if not len(parts) or not len(blocks):
            return None
        grid, offset, size = parts.T
        if parts.min() < 0 or size.min() < 1 or parts[:, 1:].max() >= 2**48:
            return "a part has a negative or impossible grid, offset or size"
        if grid.max() >= len(self.grids):
            return f"grid {int(grid.max())} does not exist, there are {len(self.grids)}"
        over = np.flatnonzero(offset + size > self._block_bytes[grid])
        if len(over):
            at = int(over[0])
            return f"bytes {offset[at]}..{offset[at] + size[at]} lie outside the blocks of grid {grid[at]}"
        limit = int(self._num_blocks[grid].min())
        if int(blocks.max()) >= limit:
            return f"block {int(blocks.max())} does not exist, there are {limit}"
        return None

    def check_plan(self, plan: CopyPlan) -> None:
        """Raises LocalProtocolError unless every destination byte of the plan lies in a block registered here."""
        runs = plan.runs
        if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.uint32:
            raise LocalProtocolError(f"runs must be uint32 of shape (n, 3), got {runs.dtype} of {runs.shape}")
        parts = np.array([(p.dst_grid, p.dst_offset, p.run_bytes) for p in plan.patterns], np.int64).reshape(-1, 3)
        last = runs[:, 1].astype(np.int64) + runs[:, 2]
        if len(runs) and len(parts):
            if int(runs[:, 2].min()) < 1:
                raise LocalProtocolError("a run of a plan has no blocks")
            # The highest id of every run is enough, and costs nothing like expanding a run of 2**32 blocks.
            fault = self.fault(last - 1, parts)
            if fault is not None:
                raise LocalProtocolError(f"the plan does not fit the memory registered here: {fault}")
            limit = int(self._num_blocks[parts[:, 0]].min())
            if plan.num_blocks > limit:
                raise LocalProtocolError(f"the plan writes {plan.num_blocks} blocks into {limit}: one is named twice")

    def load(self, blocks: Blocks, parts: Parts) -> list[Buffer]:
        """The stream of a slice: views of block memory, or one gathered copy when the pieces are small."""
        spans = self._spans(blocks, parts)
        if not _scattered(spans):
            return self._views(spans)
        out = np.empty(len(blocks) * int(parts[:, 2].sum()), np.uint8)
        at = 0
        for part in parts:
            end = at + len(blocks) * int(part[2])
            out[at:end].reshape(len(blocks), -1)[:] = self._rows(part)[blocks]
            at = end
        return [out]

    def store(self, blocks: Blocks, parts: Parts, stream: Sequence[Buffer]) -> None:
        """Write a stream that the caller found to be exactly as long as the slice; its cuts need not fall on ours."""
        spans = self._spans(blocks, parts)
        if _scattered(spans):
            whole = stream[0] if len(stream) == 1 else np.concatenate(stream)
            at = 0
            for part in parts:
                end = at + len(blocks) * int(part[2])
                self._rows(part)[blocks] = whole[at:end].reshape(len(blocks), -1)
                at = end
            return
        pieces = iter(stream)
        piece = next(pieces)
        for segment in self._views(spans):
            done = 0
            while done < len(segment):
                while not len(piece):
                    piece = next(pieces)
                size = min(len(piece), len(segment) - done)
                segment[done : done + size] = piece[:size]
                piece = piece[size:]
                done += size

    def _spans(self, blocks: Blocks, parts: Parts) -> Spans:
        """Columns (region, first byte, end byte) in stream order, neighbours in memory merged."""
        grid, offset, size = parts.T
        starts = (self._offset[grid] + offset)[:, None] + blocks.astype(np.int64)[None, :] * self._stride[grid][:, None]
        starts = starts.reshape(-1)
        ends = starts + np.repeat(size, len(blocks))
        region = np.repeat(self._region[grid], len(blocks))
        apart = np.flatnonzero((starts[1:] != ends[:-1]) | (region[1:] != region[:-1])) + 1
        first = np.concatenate(([0], apart))
        last = np.concatenate((apart, [len(starts)])) - 1
        return np.stack((region[first], starts[first], ends[last]), axis=1)

    def _views(self, spans: Spans) -> list[Buffer]:
        return [self._bytes[region][start:end] for region, start, end in spans.tolist()]

    def _rows(self, part: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Shape (blocks of the grid, bytes of the part)."""
        grid, offset, size = part.tolist()
        shape = (int(self._num_blocks[grid]), int(self._block_bytes[grid]))
        base = self._bytes[int(self._region[grid])][int(self._offset[grid]) :]
        return as_strided(base, shape, (int(self._stride[grid]), 1))[:, offset : offset + size]


def _scattered(spans: Spans) -> bool:
    return bool((spans[:, 2] - spans[:, 1]).mean() < GATHER_BELOW)
