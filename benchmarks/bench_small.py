"""How long does a small request take: 7 MiB in 224 chunks of 32 KiB, bare and as a whole pull?

Each round measures, one after the other: t1 (the same chunks copied with memcpy by one thread of another process), a
bare read over the transport, from its post to its completion, and a pull between two agents, which adds the plan, OPEN
and COMMIT over the side channel, twice: cold, after the second that the rest of the round takes, with nothing of ours
left in the caches, and warm, right after another pull. HELLO was done before. The bytes of all three are compared.

    python benchmarks/bench_small.py [--transport shm tcp] [--rounds 21] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import machine

from pd_connector import Agent, Config, Ticket
from pd_connector.bench import veth
from pd_connector.bench.case import Case
from pd_connector.bench.limit import memory_limits
from pd_connector.bench.transfer import pair
from pd_connector.bench.work import Cache, Work

CHUNK, CHUNKS = 32768, 224
DEADLINE_S = 60.0


def serve(transport: str, blocks: int, pipe: Connection) -> None:
    asyncio.run(_serve(transport, blocks, pipe))


async def _serve(transport: str, blocks: int, pipe: Connection) -> None:
    """Lease what is asked for, a list of blocks at a time."""
    async with Agent(Config(transport=transport)) as agent:
        cache = Cache(CHUNK, blocks, pooled=True, huge=False)
        cache.fill()
        agent.register([cache.region])
        loop = asyncio.get_running_loop()
        while wanted := await loop.run_in_executor(None, pipe.recv):
            ticket = agent.lease(wanted)
            pipe.send(ticket.to_bytes())
            await agent.lease_ended(ticket)


class Puller:
    """Whole pulls from an agent in another process."""

    def __init__(self, agent: Agent, work: Work, pipe: Connection) -> None:
        self._agent, self._work, self._pipe = agent, work, pipe

    async def pull(self, *, check: bool = True) -> float:
        """Seconds."""
        source, target = self._work.draw()
        self._pipe.send(source.tolist())
        if not self._pipe.poll(DEADLINE_S):
            raise TimeoutError("no ticket")
        ticket = Ticket.from_bytes(self._pipe.recv())
        start = time.perf_counter()
        await self._agent.pull(ticket, target.tolist())
        seconds = time.perf_counter() - start
        if check:
            self._work.check()
        return seconds


@contextlib.asynccontextmanager
async def puller(transport: str, blocks: int) -> AsyncIterator[Puller]:
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    owner = spawn.Process(target=serve, args=(transport, blocks, theirs), daemon=True)
    owner.start()
    try:
        async with Agent(Config(transport=transport)) as agent:
            mine = Cache(CHUNK, blocks, pooled=False, huge=False)
            agent.register([mine.region])
            yield Puller(agent, Work(mine), pipe)
    finally:
        pipe.send([])
        owner.join(5)
        owner.kill()


async def measure(case: Case) -> dict[str, Any]:
    """Of ``rounds``, after one that is not counted. Between namespaces there is no pull: agents would need keys."""
    limit, bare, cold, warm = [], [], [], []
    async with contextlib.AsyncExitStack() as stack:
        both = stack.enter_context(pair(case))
        agents = None
        if case.scope == "host":
            agents = await stack.enter_async_context(puller(case.transport, case.blocks))
        for number in range(case.rounds + 1):
            t1 = CHUNK * CHUNKS / memory_limits(CHUNK, CHUNKS, huge=False)["t1"] / 1e6
            read = both.read()[0] * 1e3
            pulls = [0.0, 0.0]
            if agents is not None:
                pulls[0] = await agents.pull() * 1e3
                await agents.pull(check=False)  # comparing bytes washed the caches
                pulls[1] = await agents.pull() * 1e3
            if number:
                for values, value in zip((limit, bare, cold, warm), (t1, read, *pulls), strict=True):
                    values.append(value)
    row = {"case": f"7 MiB in 224 chunks, {case.transport}, {case.scope}, owned", "rounds": case.rounds}
    row |= {"t1_ms": machine.spread(limit), "read_ms": machine.spread(bare)}
    row["read_to_t1"] = round(statistics.median(bare) / statistics.median(limit), 3)
    if agents is not None:
        for name, values in (("cold", cold), ("warm", warm)):
            row[f"{name}_pull_ms"] = machine.spread(values)
            row[f"{name}_pull_minus_1.1_t1_ms"] = round(statistics.median(values) - 1.1 * statistics.median(limit), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", nargs="+", choices=("shm", "tcp"), default=["shm", "tcp"])
    parser.add_argument("--scope", choices=("host", "veth"), default="host")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with veth.pair() if arguments.scope == "veth" else contextlib.nullcontext():
        for transport in arguments.transport:
            size = CHUNK * CHUNKS
            case = Case(
                transport=transport, scope=arguments.scope, chunk_bytes=CHUNK, num_bytes=size, rounds=arguments.rounds
            )
            row = asyncio.run(measure(case))
            rows.append(row)
            print(json.dumps(row) if arguments.json else "\n".join(f"{key:22} {value}" for key, value in row.items()))
    print(f"written to {machine.write('small', rows)}")


if __name__ == "__main__":
    main()
