"""What do two connected agents cost while nothing happens? Each has 448 MiB registered and has read from the other.

CPU is by the processes' own clocks, both together; wake-ups are the context switches that all their threads made of
their own will.

    python benchmarks/bench_idle.py [--transport shm tcp zmq] [--seconds 30] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine

from pd_connector import Agent, Config, Ticket
from pd_connector.bench.work import GRIDS, Cache

CHUNK = 65536
BLOCKS = (448 << 20) // CHUNK // GRIDS // 2
SETTLE_S = 5.0


def wake_ups() -> int:
    lines = [line for status in Path("/proc/self/task").glob("*/status") for line in status.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


async def one(transport: str, seconds: float, pipe: Connection) -> None:
    """Exchange tickets with the other, pull, then do nothing and say what that took."""
    async with Agent(Config(transport=transport)) as agent:
        cache = Cache(CHUNK, BLOCKS, pooled=True, huge=False)
        cache.fill()
        agent.register([cache.region])
        mine = agent.lease(range(BLOCKS))
        loop = asyncio.get_running_loop()
        pipe.send(mine.to_bytes())
        theirs = Ticket.from_bytes(await loop.run_in_executor(None, pipe.recv))
        await agent.pull(theirs, range(BLOCKS, 2 * BLOCKS))
        await agent.lease_ended(mine)
        await asyncio.sleep(SETTLE_S)  # memory is populated in the background
        cpu, woken = time.process_time(), wake_ups()
        await asyncio.sleep(seconds)
        used = time.process_time() - cpu, wake_ups() - woken
        pipe.send(used)
        await loop.run_in_executor(None, pipe.recv)


def run(transport: str, seconds: float, pipe: Connection) -> None:
    asyncio.run(one(transport, seconds, pipe))


def measure(transport: str, seconds: float) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(2)]
    both = [spawn.Process(target=run, args=(transport, seconds, theirs), daemon=True) for _, theirs in pipes]
    for process in both:
        process.start()
    (first, _), (second, _) = pipes
    try:
        tickets = [_answer(pipe, 60.0) for pipe in (first, second)]
        first.send(tickets[1])
        second.send(tickets[0])
        used = [_answer(pipe, SETTLE_S + seconds + 60.0) for pipe in (first, second)]
        for pipe in (first, second):
            pipe.send("done")
    finally:
        for process in both:
            process.join(10)
            process.kill()
    cpu, woken = (sum(each) for each in zip(*used, strict=True))
    return {
        "case": f"two idle agents, {transport}",
        "seconds": seconds,
        "registered_mib_each": BLOCKS * 2 * GRIDS * CHUNK >> 20,
        "cpu_ms_both": round(cpu * 1e3, 1),
        "percent_of_a_core": round(cpu / seconds * 100, 3),
        "wake_ups_per_second_both": round(woken / seconds, 2),
    }


def _answer(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError(f"an agent said nothing for {seconds:.0f} s")
    return pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", nargs="+", choices=("shm", "tcp", "zmq"), default=["shm", "tcp", "zmq"])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(transport, arguments.seconds) for transport in arguments.transport]
    for row in rows:
        print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"written to {machine.write('idle', rows)}")


if __name__ == "__main__":
    main()
