"""How fast does D get P's KV blocks through real vLLM, beside vLLM's own NixlConnector as shipped, in one run?

Two pairs of instances (one core for each P, the other for each D), one with PDConnector and one with NixlConnector; all
processes of a pair are stopped while the other one works. The prompts of bench_handover.py: 4,096 tokens, 235 MB. P has
the prompt in its prefix cache after the first round, D forgets it before every round, so that each round is a whole
hand-over without a prefill of ten seconds. What D saw of the transfer comes from the connectors' own metrics.

    python benchmarks/bench_rivals.py [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from bench_handover import READY_SECONDS, small_cache
from nixl_instance import nixl_instance
from paused import pause, running, wake

from pd_connector.demo.instance import Instance, vllm_instance
from pd_connector.demo.model import WIDE_KV, build_model
from pd_connector.router.order import PREFILL_TICKET

TOKENS = 4096


@dataclass(frozen=True)
class Pair:
    p: Instance
    d: Instance
    p_leg: dict[str, Any]
    metrics: tuple[str, str]
    """D's sums of bytes and of seconds."""

    def both(self) -> tuple[Instance, Instance]:
        return self.p, self.d

    def hand_over(self, prompt: list[int]) -> dict[str, float]:
        """Times in ms."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{self.d.url}/reset_prefix_cache", method="POST")
        urllib.request.urlopen(request, timeout=30).close()
        before = self._sums()
        first = self.p.post("/v1/completions", {**body, "kv_transfer_params": self.p_leg})
        start = time.perf_counter()
        self.d.post("/v1/completions", {**body, "kv_transfer_params": first["kv_transfer_params"]})
        d_leg = time.perf_counter() - start
        deadline = time.monotonic() + 15
        while (after := self._sums())[0] == before[0]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.d.name} reports no bytes: it did not read P's blocks")
            time.sleep(0.1)
        moved, seconds = (new - old for new, old in zip(after, before, strict=True))
        return {"gbps": moved / seconds / 1e9, "bytes": moved, "transfer_ms": seconds * 1e3, "d_leg_ms": d_leg * 1e3}

    def _sums(self) -> tuple[float, float]:
        values = self.d.metrics()
        return values.get(self.metrics[0], 0.0), values.get(self.metrics[1], 0.0)


def pairs(directory: Path) -> list[tuple[str, Pair]]:
    model = build_model(directory / "model", WIDE_KV)
    cache = small_cache(TOKENS)
    roles = (("P", "kv_producer", 0), ("D", "kv_consumer", 1))
    dev = {"VLLM_SERVER_DEV_MODE": "1"}
    ours = [
        vllm_instance(name, model, directory / f"{name}.log", role=role, core=core, arguments=cache, environment=dev)
        for name, role, core in roles
    ]
    names = "vllm:pdc_bytes_transferred_sum", "vllm:pdc_xfer_time_seconds_sum"
    made = [("pd_connector", Pair(ours[0], ours[1], {"do_remote_decode": True}, names))]
    theirs = [nixl_instance(f"nixl-{name}", model, directory, role, core, cache) for name, role, core in roles]
    names = "vllm:nixl_bytes_transferred_sum", "vllm:nixl_xfer_time_seconds_sum"
    made.append(("nixl", Pair(theirs[0], theirs[1], PREFILL_TICKET, names)))
    return made


def measure(rounds: int, directory: Path) -> dict[str, Any]:
    chance = random.Random(1)
    prompt = [chance.randrange(WIDE_KV.vocabulary - 3) for _ in range(TOKENS)]
    found: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        every = pairs(directory)
        for _, pair in every:
            for instance in pair.both():
                stack.callback(instance.stop)
                instance.start()
            for instance in pair.both():
                instance.wait_ready(READY_SECONDS)
                instance.post("/v1/completions", {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 2})
            pause(*pair.both())
            stack.callback(wake, *pair.both())  # before it is stopped for good
        for number in range(rounds + 2):  # the first one prefills, the second one finds memory that was never used
            for name, pair in every:
                with running(*pair.both()):
                    row = pair.hand_over(prompt)
                print(f"round {number}: {name} {row['gbps']:.2f} GB/s, D leg {row['d_leg_ms']:.0f} ms", file=sys.stderr)
                if number > 1:
                    found.setdefault(name, []).append(row)
    result: dict[str, Any] = {"case": "vllm 1P1D, sequential, beside NixlConnector as shipped", "tokens": TOKENS}
    result |= {"rounds": rounds, "cores": "one for P, one for D", "pages": "as vLLM allocates, gathered by us only"}
    for name, rows in found.items():
        result[f"{name}_bytes"] = int(rows[0]["bytes"])
        for key in ("gbps", "transfer_ms", "d_leg_ms"):
            result[f"{name}_{key}"] = machine.spread([row[key] for row in rows], 2)
    medians = {name: statistics.median(row["gbps"] for row in rows) for name, rows in found.items()}
    result["ratio_to_nixl"] = round(medians["pd_connector"] / medians["nixl"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the row as JSON only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        row = measure(arguments.rounds, Path(directory))
    path = machine.write("rivals", [row])
    if arguments.json:
        print(json.dumps(row))
        return
    for key, value in row.items():
        print(f"{key:26} {value}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
