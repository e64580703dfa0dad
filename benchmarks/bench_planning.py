"""How much CPU time of Python does a transfer cost, as its blocks grow more?

Two agents on one loop, so that both sides of lease, plan, OPEN, read, COMMIT and release are counted, in blocks of a
few bytes over shared memory, so that next to nothing is copied. `runs` is what planning found: rising ids make one run,
shuffled ids one per block. A block of a 28-layer model with 56 KiB of KV per token and 128 tokens is 7 MB, which take
700 us to copy at 10 GB/s: compare that with us_per_block. Before that, planning alone, between instances that are alike
and that are not.

    python benchmarks/bench_planning.py [--blocks 8 64 512 4096 32768] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import machine
import numpy as np

from pd_connector import Agent, Config, Ticket
from pd_connector.memory import BlockGrid, Pool, Region
from pd_connector.ranks import shares
from pd_connector.reshard import Blocks, Resharding, overlay
from pd_connector.testing.instances import Shape, Style, instance

GRIDS, BLOCK_BYTES, ROUNDS = 56, 8, 9
LAYERS, SCATTERED = 61, 100_000


def cache(blocks: int) -> Region:
    memory = np.frombuffer(Pool(GRIDS * blocks * BLOCK_BYTES), np.uint8)
    size = blocks * BLOCK_BYTES
    grids = tuple(BlockGrid(0, grid, grid * size, BLOCK_BYTES, BLOCK_BYTES, blocks) for grid in range(GRIDS))
    return Region(memory.ctypes.data, memory.nbytes, grids, keepalive=memory)


async def measure(blocks: int, *, shuffled: bool) -> dict[str, Any]:
    source, target = list(range(blocks)), list(range(blocks))
    if shuffled:
        random.shuffle(source)
    used = []
    async with Agent(Config(transport="shm")) as owner, Agent(Config(transport="shm")) as reader:
        for agent in (owner, reader):
            agent.register([cache(blocks)])
        for _ in range(ROUNDS + 1):
            start = time.thread_time()
            ticket = Ticket.from_bytes(owner.lease(source).to_bytes())
            await reader.pull(ticket, target)
            used.append((time.thread_time() - start) * 1e6)
    row = {"case": f"python of one transfer, {'shuffled' if shuffled else 'rising'} ids", "blocks": blocks}
    return row | {"us": machine.spread(used[1:], 0), "us_per_block": round(statistics.median(used[1:]) / blocks, 3)}


PAIRS = (
    ("16 to 16", 16, 1, 16, 1),
    ("16 to 128", 16, 1, 128, 1),
    ("128 to 16", 128, 1, 16, 1),
    ("TP 8 to 4", 16, 8, 16, 4),
)
"""What, then tokens per block and tensor-parallel size of the owner and of the reader."""


def plan(what: str, src_tokens: int, src_ranks: int, dst_tokens: int, dst_ranks: int) -> dict[str, Any]:
    """CPU time of this process for one rank's plans of 100,000 blocks in random order, 61 layers of K and V."""
    shape = Shape(heads=8, layers=LAYERS, channels=2)
    owners, readers = (
        [rank.layout for rank in instance(shape, Style("token-major", "split", tokens), ranks, 1, 1)]
        for tokens, ranks in ((src_tokens, src_ranks), (dst_tokens, dst_ranks))
    )
    parts = {n: Resharding(readers[0], owners[n], share) for n, share in shares(readers[0], owners).items()}
    tokens = SCATTERED * min(src_tokens, dst_tokens)
    order = np.random.default_rng(0)
    source, target = (
        Blocks(order.permutation(tokens // size).astype(np.uint32), size) for size in (src_tokens, dst_tokens)
    )
    used, runs = [], 0
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        found = overlay(source, target, 0, tokens)
        plans = [one for part in parts.values() for one in part.apply(0, found)]
        used.append((time.process_time() - start) * 1e3)
        runs = sum(len(one.runs) for one in found)
    row = {"case": f"planning {SCATTERED} scattered blocks, {what}", "blocks": SCATTERED, "runs": runs}
    return row | {"ms": machine.spread(used[1:], 1), "plans": len(plans)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 64, 512, 4096, 32768])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [plan(*pair) for pair in PAIRS]
    for row in rows:
        print(json.dumps(row) if arguments.json else f"{row['case']:42} {row['runs']:6} runs {row['ms']} ms CPU")
    for shuffled in (False, True):
        for blocks in arguments.blocks:
            rows.append(asyncio.run(measure(blocks, shuffled=shuffled)))
            row = rows[-1]
            print(
                json.dumps(row) if arguments.json else f"{row['case']:42} {blocks:6} {row['us']} {row['us_per_block']}"
            )
    print(f"written to {machine.write('planning', rows)}")


if __name__ == "__main__":
    main()
