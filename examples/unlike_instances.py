"""Two prefill ranks with two heads each and blocks of 16 tokens; one decode rank with all four and blocks of 32."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np

from pd_connector import Agent, Config, Form, GroupLayout, KVLayout, heads_of_rank, strided_parts

LAYERS, HEADS, CHANNELS, TOKENS = 4, 4, 64, 70
MODEL = np.random.default_rng(0).random((LAYERS, HEADS, TOKENS, 2 * CHANNELS)).astype(np.float16)
"""The KV of one prompt: K and V of a token and head lie side by side."""


class Rank:
    """A KV cache (layer, block, head, token in block, K and V) and its layout."""

    def __init__(self, rank: int, ranks: int, block_tokens: int) -> None:
        self.first, self.heads = heads_of_rank(HEADS, ranks, rank)
        self.cache = np.zeros((LAYERS, 8, self.heads, block_tokens, 2 * CHANNELS), np.float16)
        block = self.cache[0, 0]
        axes = dict(zip(("head", "token", "channel"), zip(block.shape, block.strides, strict=True), strict=True))
        form = Form(block_bytes=(block.nbytes,), parts=strided_parts(axes, block.itemsize))
        group = GroupLayout(
            kind="full", block_tokens=block_tokens, heads=self.heads, first_head=self.first, total_heads=HEADS,
            dtype="float16", layers=tuple(f"layer.{i}" for i in range(LAYERS)), forms=(form,), form_of=(0,) * LAYERS,
        )  # fmt: skip
        self.layout = KVLayout(rank=rank, ranks=ranks, groups=(group,))

    def view(self, blocks: list[int]) -> np.ndarray:
        """The tokens of these blocks in order: (layer, head, token, K and V)."""
        found = self.cache[:, blocks].swapaxes(1, 2)
        return found.reshape(LAYERS, self.heads, -1, 2 * CHANNELS)


async def main() -> None:
    prefill, decode = [Rank(0, 2, 16), Rank(1, 2, 16)], Rank(0, 1, 32)
    async with AsyncExitStack() as stack:
        speaker, reader, *owners = [await stack.enter_async_context(Agent(Config())) for _ in range(4)]
        for agent, rank in zip([*owners, reader], [*prefill, decode], strict=True):
            agent.register(list(rank.cache), rank.layout)
        # One address for the whole prefill instance; whoever asks there learns which ranks it has.
        speaker.speak_for([owner.endpoint(rank) for rank, owner in enumerate(owners)])
        blocks = [5, 0, 3, 6, 1]
        for rank in prefill:
            padded = np.zeros((LAYERS, rank.heads, 80, 2 * CHANNELS), np.float16)
            padded[:, :, :TOKENS] = MODEL[:, rank.first : rank.first + rank.heads]
            rank.cache[:, blocks] = padded.reshape(LAYERS, rank.heads, 5, 16, -1).swapaxes(1, 2)
        ticket = speaker.lease(blocks, tokens=TOKENS)
        for owner in owners:
            owner.grant(ticket)
        stats = await reader.pull(ticket, [7, 2, 4], tokens=[(0, TOKENS)])
        np.testing.assert_array_equal(decode.view([7, 2, 4])[:, :, :TOKENS], MODEL)
        print(f"{TOKENS} tokens of {HEADS} heads from {len(owners)} ranks, {stats.bytes} bytes, all equal")


if __name__ == "__main__":
    asyncio.run(main())
