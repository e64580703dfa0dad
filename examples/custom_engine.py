"""An engine of your own, in two processes: prefill leases KV blocks and sends a ticket, decode pulls them by it."""

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

from pd_connector import Agent, Config, Ticket

LAYERS, BLOCKS, TOKENS, CHANNELS = 4, 64, 16, 128


def kv_cache() -> list[np.ndarray]:
    """One array per layer; the first axis counts blocks, a block has K and V of 16 tokens."""
    return [np.zeros((BLOCKS, 2, TOKENS, CHANNELS), np.float16) for _ in range(LAYERS)]


def forward(layer: int, blocks: int) -> np.ndarray:
    """What the model would compute."""
    return np.random.default_rng(layer).random((blocks, 2, TOKENS, CHANNELS)).astype(np.float16)


async def prefill(pipe: Connection) -> None:
    cache, prompt_blocks = kv_cache(), [11, 3, 42]
    async with Agent(Config()) as agent:
        agent.register(cache)
        for layer, kv in enumerate(cache):
            kv[prompt_blocks] = forward(layer, len(prompt_blocks))
        ticket = agent.lease(prompt_blocks, tokens=40)
        pipe.send_bytes(ticket.to_bytes())
        print(f"prefill: blocks {prompt_blocks} are free again: {await agent.lease_ended(ticket)}", flush=True)


async def decode(pipe: Connection) -> None:
    cache, my_blocks = kv_cache(), [7, 8, 0]
    async with Agent(Config(audit=True)) as agent:
        agent.register(cache)
        ticket = Ticket.from_bytes(await asyncio.to_thread(pipe.recv_bytes))
        stats = await agent.pull(ticket, my_blocks)
        for layer, kv in enumerate(cache):
            np.testing.assert_array_equal(kv[my_blocks], forward(layer, len(my_blocks)))
        print(f"decode: {ticket.tokens} tokens, {stats.bytes} bytes over {stats.transport}, all equal", flush=True)


def prefill_process(pipe: Connection) -> None:
    asyncio.run(prefill(pipe))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=prefill_process, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that a prefill that dies ends our wait for the ticket
    asyncio.run(decode(ours))
    process.join(10)
