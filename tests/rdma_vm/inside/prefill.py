"""A prefill instance's agent with known KV, in a process of its own: prints a ticket, then what became of its lease."""

from __future__ import annotations

import asyncio
import sys

import msgspec
import numpy as np
import numpy.typing as npt

from pd_connector import Agent, Config

LAYERS, BLOCKS, TOKENS, CHANNELS = 4, 96, 16, 512
PROMPT = [11, 3, 42, 7, 90, *range(44, 84)]
"""Blocks of the prompt: scattered ones, and a run."""


def kv_cache() -> list[npt.NDArray[np.float16]]:
    return [np.zeros((BLOCKS, 2, TOKENS, CHANNELS), np.float16) for _ in range(LAYERS)]


def forward(layer: int) -> npt.NDArray[np.float16]:
    return np.random.default_rng(layer).random((len(PROMPT), 2, TOKENS, CHANNELS)).astype(np.float16)


async def main(config: Config, spoil: bool) -> None:
    cache = kv_cache()
    for layer, kv in enumerate(cache):
        kv[PROMPT] = forward(layer)
    async with Agent(config) as agent:
        agent.register(cache)
        ticket = agent.lease(PROMPT, tokens=len(PROMPT) * TOKENS)
        if spoil:
            cache[2].view(np.uint8).reshape(-1)[cache[2][PROMPT[1]].nbytes * PROMPT[1] + 100] ^= 1
        print(ticket.to_bytes().hex(), flush=True)
        print(await agent.lease_ended(ticket), flush=True)


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Config), sys.argv[2] == "spoil"))
