"""What does the connector cost a prefill? One P without a connector and one with PDConnector, pair by pair.

Both run on the same core; all processes of one are stopped while the other works. Each pair of runs prefills the same
fresh prompt of 4,096 tokens (235 MB of KV), the order alternates. P with the connector leases the blocks and makes the
ticket; it is released as soon as the answer is there. What it costs is said twice: by the clock (the difference of wall
times, with an interval by bootstrap), and by what timed_connector.py counts: the time inside our hooks plus the CPU
time of our threads, as a share of the CPU time of P's prefill.

    python benchmarks/bench_prefill.py [--pairs 12] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from bench_handover import READY_SECONDS, cpu_seconds, small_cache
from paused import pause, running, wake

from pd_connector.config import Config
from pd_connector.demo.instance import Instance, vllm_instance
from pd_connector.demo.model import WIDE_KV, build_model
from pd_connector.router.broker import AgentBroker

TOKENS = 4096
HERE = Path(__file__).parent


def instances(directory: Path) -> tuple[Instance, Instance]:
    """(without, with) the connector."""
    model = build_model(directory / "model", WIDE_KV)
    more = [*small_cache(TOKENS), "--no-enable-prefix-caching"]
    transfer = {
        "kv_connector": "TimedConnector",
        "kv_connector_module_path": "timed_connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"io_cpus": [0]},
    }
    times = directory / "times"
    times.mkdir()
    environment = {"PYTHONPATH": str(HERE), "PDC_TIMES": str(times)}
    return (
        vllm_instance("without", model, directory / "without.log", core=0, arguments=more),
        vllm_instance(
            "with",
            model,
            directory / "with.log",
            core=0,
            arguments=[*more, "--kv-transfer-config", json.dumps(transfer)],
            environment=environment,
        ),
    )


def ours_so_far(times: Path) -> tuple[float, float]:
    """(seconds inside our hooks, CPU seconds of our threads) of all processes."""
    hooks = threads = 0.0
    for path in times.iterdir():
        page = path.read_bytes()
        hooks += struct.unpack_from("<d", page)[0]
        for thread in set(struct.unpack_from(f"<{len(page) // 8 - 1}Q", page, 8)) - {0}:
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{path.name}/task/{thread}/schedstat").read_text()
                threads += int(text.split()[0]) / 1e9
    return hooks, threads


def prefill(instance: Instance, prompt: list[int], params: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """(wall seconds, CPU seconds of the instance, answer)."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **params}
    cpu, start = cpu_seconds(instance), time.perf_counter()
    answer = instance.post("/v1/completions", body)
    return time.perf_counter() - start, cpu_seconds(instance) - cpu, answer


async def compare(pairs: int, directory: Path) -> dict[str, Any]:
    chance = random.Random(1)
    lease = {"kv_transfer_params": {"do_remote_decode": True}}
    walls: list[tuple[float, float]] = []
    shares: list[tuple[float, float]] = []
    async with contextlib.AsyncExitStack() as stack:
        without, with_ = instances(directory)
        for instance in (without, with_):
            stack.callback(instance.stop)
            instance.start()
        for instance in (without, with_):
            instance.wait_ready(READY_SECONDS)
            stack.callback(wake, instance)
            pause(instance)
        broker = await stack.enter_async_context(AgentBroker(Config()))
        for number in range(pairs + 1):
            prompt = [chance.randrange(WIDE_KV.vocabulary - 3) for _ in range(TOKENS)]
            wall: dict[str, float] = {}
            for instance in (without, with_) if number % 2 else (with_, without):
                with running(instance):
                    before = ours_so_far(directory / "times")
                    took, cpu, answer = prefill(instance, prompt, lease if instance is with_ else {})
                    wall[instance.name] = took
                    if instance is with_:
                        hooks, threads = (
                            new - old for new, old in zip(ours_so_far(directory / "times"), before, strict=True)
                        )
                        share = (hooks / cpu, threads / cpu)
                        await broker.release(answer["kv_transfer_params"])
                        await asyncio.sleep(1)
            print(f"pair {number}: {wall}, hooks and threads {share}", file=sys.stderr)
            if number:
                walls.append((wall["without"], wall["with"]))
                shares.append(share)
    return row(walls, shares)


def row(walls: list[tuple[float, float]], shares: list[tuple[float, float]]) -> dict[str, Any]:
    change = np.array([100 * (with_ / without - 1) for without, with_ in walls])
    picks = np.random.default_rng(0).integers(0, len(change), (20000, len(change)))
    low, high = np.percentile(change[picks].mean(axis=1), [2.5, 97.5])
    return {
        "case": "prefill of 4,096 tokens on P, one core, with PDConnector against without a connector",
        "pairs": len(walls),
        "without_s": machine.spread([without for without, _ in walls], 2),
        "with_s": machine.spread([with_ for _, with_ in walls], 2),
        "change_percent": {
            "mean": round(float(change.mean()), 2),
            "low": round(float(low), 2),
            "high": round(float(high), 2),
        },
        "hooks_percent_of_cpu": round(100 * statistics.median(hooks for hooks, _ in shares), 3),
        "threads_percent_of_cpu": round(100 * statistics.median(threads for _, threads in shares), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print the row as JSON only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(compare(arguments.pairs, Path(directory)))
    path = machine.write("prefill", [found])
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:24} {value}" for key, value in found.items()))
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
