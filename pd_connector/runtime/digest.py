"""Digests of blocks in our own memory, for the audit of transfers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pd_connector.memory import GridRef
from pd_connector.plan import Runs
from pd_connector.protocol.messages import DIGEST_BYTES


def digest_blocks(
    views: Sequence[memoryview], grids: Sequence[GridRef], wanted: Sequence[int], runs: Runs, column: int
) -> bytes:
    """DIGEST_BYTES of BLAKE2b for every grid in ``wanted`` and every block in ``column`` of ``runs``, in that order.

    ``views`` are the regions' bytes. hashlib releases the GIL for each block.
    """
    blocks = [first + i for first, count in runs[:, [column, 2]].tolist() for i in range(count)]
    out = bytearray()
    for index in wanted:
        ref = grids[index]
        view, grid = views[ref.region], ref.grid
        for block in blocks:
            start = grid.offset + block * grid.block_stride
            out += hashlib.blake2b(view[start : start + grid.block_bytes], digest_size=DIGEST_BYTES).digest()
    return bytes(out)
