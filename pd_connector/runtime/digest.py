"""Digests of blocks in our own memory, for the audit of transfers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pd_connector.memory import GridRef
from pd_connector.plan import Side
from pd_connector.protocol.messages import DIGEST_BYTES
from pd_connector.runtime.windows import Windows


def digest_blocks(windows: Windows, grids: Sequence[GridRef], sides: Sequence[Side]) -> bytes:
    """DIGEST_BYTES of BLAKE2b for every side, place and block, in this order, over the place's runs one behind another:
    the same on both sides of a read, however each arranges its blocks.

    hashlib releases the GIL for each block."""
    out = bytearray()
    for blocks, places in sides:
        for place in places:
            ref = grids[place.grid]
            counts, strides = [count for count, _ in place.dims], [stride for _, stride in place.dims]
            first = ref.grid.offset + place.offset
            span = place.run_bytes + sum((count - 1) * stride for count, stride in place.dims)
            for block in blocks.tolist():
                base = windows.look(ref.region, first + block * ref.grid.block_stride, span)
                rows = as_strided(base, (*counts, place.run_bytes), (*strides, 1))
                out += hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=DIGEST_BYTES).digest()
    return bytes(out)
