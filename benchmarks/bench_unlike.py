"""What does it cost that prefill and decode instances are not alike? GB/s of pulls between agents, beside the pull of
equal ones in the same run, and beside a copy of as many bytes by the extension.

Every case moves the same KV: 28 layers of 4 heads x 128 channels, bfloat16, in random blocks. Interleaved, medians.

    python benchmarks/bench_unlike.py [--tokens 2048] [--rounds 9] [--transport shm tcp] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from typing import Any

import machine
import numpy as np

from pd_connector import Agent, Config
from pd_connector.memory import copier
from pd_connector.testing.instances import Shape, Style, instance, logical, write

SHAPE = Shape(heads=4, layers=28, channels=256)
HEADS, TOKENS = ("head-major", "head"), ("token-major", "inner")
CASES: dict[str, tuple[tuple[Style, int], tuple[Style, int]]] = {
    "alike": ((Style(*HEADS, 128), 1), (Style(*HEADS, 128), 1)),
    "TP 2 to 1": ((Style(*HEADS, 128), 2), (Style(*HEADS, 128), 1)),
    "TP 1 to 2, one rank": ((Style(*HEADS, 128), 1), (Style(*HEADS, 128), 2)),
    "TP 1 to 2, tokens before heads, one rank": ((Style(*TOKENS, 128), 1), (Style(*TOKENS, 128), 2)),
    "blocks of 32 to 128": ((Style(*HEADS, 32), 1), (Style(*HEADS, 128), 1)),
    "blocks of 128 to 32": ((Style(*HEADS, 128), 1), (Style(*HEADS, 32), 1)),
    "tokens before heads to heads before tokens": ((Style(*TOKENS, 128), 1), (Style(*HEADS, 128), 1)),
}
"""Of owner and reader: how blocks are arranged, and the tensor-parallel size."""


class Case:
    """One reader rank and the owner ranks that it reads from, in one process."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name = name
        (p, p_ranks), (d, d_ranks) = CASES[name]
        self._tokens = tokens
        sizes = [-(-tokens // style.block_tokens) for style in (p, d)]
        self._owners = instance(SHAPE, p, p_ranks, 1, sizes[0])
        readers = instance(SHAPE, d, d_ranks, 1, sizes[1])
        self._reader, self._readers = readers[0], [rank.layout for rank in readers]
        order = np.random.default_rng(1)
        self._source, self._target = (order.permutation(size) for size in sizes)
        self._kv = logical(SHAPE, p, tokens)
        write(self._owners, self._kv, self._source, 0, tokens)
        self.seconds: list[float] = []
        self.bytes = 0

    async def start(self, stack: contextlib.AsyncExitStack, transport: str) -> None:
        config = Config(transport=(transport,))
        self._agents = [await stack.enter_async_context(Agent(config)) for _ in self._owners]
        for agent, rank in zip(self._agents, self._owners, strict=True):
            agent.register(rank.regions(), rank.layout)
        self._speaker = await stack.enter_async_context(Agent(Config()))
        self._speaker.speak_for(
            [agent.endpoint(rank.layout.rank) for agent, rank in zip(self._agents, self._owners, strict=True)]
        )
        self._puller = await stack.enter_async_context(Agent(config))
        self._puller.register(self._reader.regions(), self._reader.layout)
        self._puller.belong_to(self._readers)

    async def read(self) -> None:
        for grid in self._reader.grids:
            grid[:] = 0
        ticket = self._speaker.lease(self._source.tolist(), tokens=self._tokens, readers=len(self._readers))
        for agent in self._agents:
            agent.grant(ticket)
        start = time.perf_counter()
        stats = await self._puller.pull(ticket, self._target.tolist(), tokens=[(0, self._tokens)])
        self.seconds.append(time.perf_counter() - start)
        self.bytes = stats.bytes
        for agent in (*self._agents, self._speaker):
            agent.end(ticket.lease, "read")

    def check(self) -> None:
        """Raises AssertionError unless every byte of the last read is right."""
        held = [grid.copy() for grid in self._reader.grids]
        for grid in self._reader.grids:
            grid[:] = 0
        write([self._reader], self._kv, self._target, 0, self._tokens)
        assert all(map(np.array_equal, held, self._reader.grids)), self.name


def copy_gbps(size: int) -> float:
    """The extension's copy of one piece of memory to another, by one thread."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copy, times = copier(), []
    for _ in range(5):
        start = time.perf_counter()
        copy(target, source)
        times.append(time.perf_counter() - start)
    return size / statistics.median(times) / 1e9


async def measure(transport: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    async with contextlib.AsyncExitStack() as stack:
        cases = [Case(name, tokens) for name in CASES]
        for case in cases:
            await case.start(stack, transport)
        for _ in range(rounds + 1):
            for case in cases:
                await case.read()
        limit = copy_gbps(cases[0].bytes)
        rows = []
        for case in cases:
            case.check()
            gbps = [case.bytes / seconds / 1e9 for seconds in case.seconds[1:]]
            alike = cases[0].bytes / statistics.median(cases[0].seconds[1:]) / 1e9
            row = {"case": case.name, "transport": transport, "bytes": case.bytes, "gbps": machine.spread(gbps, 2)}
            rows.append(row | {"times_alike": round(statistics.median(gbps) / alike, 2), "copy_gbps": round(limit, 1)})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--transport", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for transport in arguments.transport:
        rows += asyncio.run(measure(transport, arguments.tokens, arguments.rounds))
    for row in rows:
        words = f"{row['transport']:4} {row['case']:44} {row['gbps']} GB/s, {row['times_alike']} x alike"
        print(json.dumps(row) if arguments.json else words)
    print(f"written to {machine.write('unlike', rows)}")


if __name__ == "__main__":
    main()
