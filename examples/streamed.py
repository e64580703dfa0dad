"""Hand-over while prefill still computes, in your own engine: a lease that grows, and a reader that follows it."""

import asyncio
import secrets

import numpy as np

from pd_connector import Agent, Config
from pd_connector.layout import Form, GroupLayout, KVLayout, Part

LAYERS, BLOCKS, TOKENS, CHANNELS = 4, 64, 16, 128
STEPS = 6  # of one block each


def kv_cache() -> list[np.ndarray]:
    """One array per layer: blocks of 16 tokens."""
    return [np.zeros((BLOCKS, TOKENS, CHANNELS), np.float16) for _ in range(LAYERS)]


def layout() -> KVLayout:
    """Reading by tokens needs to know what lies where in a block: here one token after the other."""
    token = CHANNELS * 2
    form = Form(block_bytes=(TOKENS * token,), parts=(Part(name="kv", unit_bytes=token, token_stride=token),))
    names = tuple(f"layer {n}" for n in range(LAYERS))
    group = GroupLayout(
        kind="full", block_tokens=TOKENS, dtype="float16", layers=names, forms=(form,), form_of=(0,) * LAYERS
    )
    return KVLayout(groups=(group,))


async def prefill(agent: Agent, cache: list[np.ndarray], capability: bytes) -> None:
    """Lease nothing, then compute block after block and say so."""
    ticket = agent.lease([], tokens=STEPS * TOKENS, growing=True, capability=capability)
    blocks: list[int] = []
    for step in range(STEPS):
        blocks.append(40 - step)
        for layer, array in enumerate(cache):
            array[blocks[-1]] = 100 * layer + step  # what the model would compute
        await asyncio.sleep(0.02)
        agent.grow(ticket.with_blocks(blocks), [len(blocks) * TOKENS], complete=step == STEPS - 1)
    print("prefill:", await agent.lease_ended(ticket))


async def decode(agent: Agent, address: str, capability: bytes) -> None:
    """Wait until the lease exists, then read along."""
    ticket = await agent.expect(address, capability, 10)
    stats = await agent.pull(
        ticket,
        list(range(STEPS)),
        tokens=[(0, ticket.tokens)],
        follow=True,
        on_part=lambda usable: print(f"decode: the first {usable} tokens may be used"),
    )
    print(f"decode: {stats.bytes} bytes over {stats.transport}")


async def main() -> None:
    p_cache, d_cache = kv_cache(), kv_cache()
    async with Agent(Config(), name="P") as p, Agent(Config(), name="D") as d:
        p.register(p_cache, layout())
        d.register(d_cache, layout())
        capability = secrets.token_bytes(16)  # a router would choose it, and tell both
        await asyncio.gather(prefill(p, p_cache, capability), decode(d, p.address, capability))
    for layer, array in enumerate(d_cache):
        assert [int(block[0, 0]) for block in array[:STEPS]] == [100 * layer + step for step in range(STEPS)]
    print("every block is where it belongs")


if __name__ == "__main__":
    asyncio.run(main())
