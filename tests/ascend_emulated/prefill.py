"""A prefill instance's agent with its KV on an emulated NPU, in a process of its own. Not run on hardware.

Words: its config, "spoil", and the transports that shall not be there.
"""

from __future__ import annotations

import asyncio
import sys
from unittest.mock import patch

import msgspec
import numpy as np
import numpy.typing as npt

from pd_connector import Agent, Config
from pd_connector.memory import BlockGrid, Region
from pd_connector.transport.registry import load

from .device import npu

BLOCKS, BLOCK_BYTES = 64, 65536
PROMPT = [3, 9, 4, *range(20, 50)]


def forward() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (len(PROMPT), BLOCK_BYTES), np.uint8)


async def main(config: Config, spoil: bool) -> None:
    placed = npu(BLOCKS * BLOCK_BYTES)
    blocks = placed.array.reshape(BLOCKS, BLOCK_BYTES)
    blocks[PROMPT] = forward()
    grid = BlockGrid(0, 0, 0, BLOCK_BYTES, BLOCK_BYTES, BLOCKS)
    async with Agent(config) as agent:
        agent.register([Region(placed.address, placed.array.nbytes, (grid,), placed.kind, placed.keepalive)])
        ticket = agent.lease(PROMPT)
        if spoil:
            blocks[PROMPT[1], 100] ^= 1
        print(ticket.to_bytes().hex(), flush=True)
        print(await agent.lease_ended(ticket), flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if name != "spoil":
            patch.object(load(name), "probe", classmethod(lambda cls, options: "not here")).start()
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Config), "spoil" in sys.argv))
