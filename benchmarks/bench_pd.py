"""Time to first token through real vLLM: P/D streamed, P/D sequential, plain, and NixlConnector, in one run.

Prompts of 4,096 tokens (56 KiB of KV each, 235 MB) in chunks of 512; one core for P, one for D; nothing is cached. All
processes of a pair are stopped while another one works, and the ways take turns. Times are the host's monotonic clock:
P's worker notes when its forwards begin and end, the client when tokens arrive.

    python benchmarks/bench_pd.py [--rounds 7] [--without-nixl] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import secrets
import struct
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import machine
from bench_handover import READY_SECONDS, cpu_seconds, small_cache
from nixl_instance import StampedBy, nixl_instance
from paused import pause, running, wake

from pd_connector.demo.instance import Instance, free_port, vllm_instance
from pd_connector.demo.model import WIDE_KV, build_model
from pd_connector.protocol.params import stream_params, transfer_params
from pd_connector.router.order import PREFILL_TICKET

TOKENS, CHUNK, ANSWER = 4096, 512, 8
HERE = Path(__file__).parent


@dataclass
class Pair:
    name: str
    p: Instance
    d: Instance
    stamps: Path
    address: str = ""

    def forwards(self, since: float) -> tuple[float, float]:
        """When P's first forward began after ``since`` and its last one ended; idle steps take less than 30 ms."""
        data = self.stamps.read_bytes()
        steps = [(begin, end) for begin, end in struct.iter_unpack("<dd", data[: len(data) // 16 * 16])]
        computed = [(begin, end) for begin, end in steps if begin > since and end - begin > 0.03]
        return computed[0][0], computed[-1][1]


@dataclass
class Arrivals:
    """When tokens came."""

    times: list[float] = field(default_factory=list)

    def ask(self, instance: Instance, body: dict[str, Any]) -> None:
        host = urlsplit(instance.url)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{instance.name} answered {answer.status}: {answer.read()[:300]!r}")
        while line := answer.readline():
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    raise RuntimeError(f"{instance.name}: {line[:300]!r}")
                self.times.append(time.monotonic())
        connection.close()


def body_of(prompt: list[int], tokens: int, params: dict[str, Any] | None, stream: bool) -> dict[str, Any]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": stream}
    return body if params is None else body | {"kv_transfer_params": params}


def one_request(pair: Pair, way: str, prompt: list[int]) -> dict[str, float]:
    """One request one way. Times in ms."""
    arrivals = Arrivals()
    cpu, start = (cpu_seconds(pair.p), cpu_seconds(pair.d)), time.monotonic()
    d_start = start
    if way == "plain":
        arrivals.ask(pair.p, body_of(prompt, ANSWER, None, True))
    elif way == "sequential":
        params = (
            PREFILL_TICKET if pair.name == "nixl" else PREFILL_TICKET | transfer_params(secrets.token_bytes(16), False)
        )
        ticket = pair.p.post("/v1/completions", body_of(prompt, 1, params, False))["kv_transfer_params"]
        d_start = time.monotonic()
        arrivals.ask(pair.d, body_of(prompt, ANSWER, ticket, True))
    else:
        transfer = secrets.token_bytes(16)
        params = PREFILL_TICKET | transfer_params(transfer, True)
        prefill = threading.Thread(target=pair.p.post, args=("/v1/completions", body_of(prompt, 1, params, False)))
        prefill.start()
        arrivals.ask(pair.d, body_of(prompt, ANSWER, stream_params(pair.address, transfer), True))
        prefill.join()
    first, times = arrivals.times[0], arrivals.times
    begun, ended = pair.forwards(start) if way != "plain" else (start, first)
    return {
        "ttft_ms": 1e3 * (first - start),
        "prefill_ms": 1e3 * (ended - begun),
        "after_prefill_ms": 1e3 * (first - ended),
        "d_leg_ms": 1e3 * (first - d_start),
        "decode_step_ms": 1e3 * (times[-1] - times[1]) / (len(times) - 2),
        "cpu_p_s": cpu_seconds(pair.p) - cpu[0],
        "cpu_d_s": cpu_seconds(pair.d) - cpu[1],
    }


def pairs(directory: Path, nixl: bool) -> list[Pair]:
    model = build_model(directory / "model", WIDE_KV)
    more = [*small_cache(TOKENS + CHUNK), "--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK)]
    made = []
    for name in ("pd_connector", *(["nixl"] if nixl else [])):
        sides = []
        stamps, port = directory / f"{name}.stamps", free_port()
        for side, role, core in (("P", "kv_producer", 0), ("D", "kv_consumer", 1)):
            label = f"{name}-{side}"
            stamped = {"PDC_STAMPS": str(stamps if side == "P" else directory / "unused")}
            if name == "nixl":
                sides.append(
                    nixl_instance(label, model, directory, role, core, more, StampedBy("StampedNixl", stamped))
                )
                continue
            transfer = {
                "kv_connector": "StampedConnector",
                "kv_connector_module_path": "stamped_connector",
                "kv_role": role,
                "kv_connector_extra_config": {"io_cpus": [core], "port": port if side == "P" else 0},
            }
            arguments = [*more, "--kv-transfer-config", json.dumps(transfer)]
            environment = stamped | {"PYTHONPATH": str(HERE)}
            log = directory / f"{label}.log"
            sides.append(vllm_instance(label, model, log, core=core, arguments=arguments, environment=environment))
        made.append(Pair(name, *sides, stamps, f"tcp://127.0.0.1:{port}"))
    return made


def measure(rounds: int, nixl: bool, directory: Path) -> list[dict[str, Any]]:
    chance = random.Random(1)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        every = pairs(directory, nixl)
        for pair in every:
            for instance in (pair.p, pair.d):
                stack.callback(instance.stop)
                instance.start()
            for instance in (pair.p, pair.d):
                instance.wait_ready(READY_SECONDS)
                instance.post("/v1/completions", body_of([1, 2, 3], 2, None, False))
            pause(pair.p, pair.d)
            stack.callback(wake, pair.p, pair.d)  # before it is stopped for good
        ways = [(every[0], way) for way in ("streamed", "sequential", "plain")]
        ways += [(pair, "sequential") for pair in every[1:]]
        for number in range(rounds + 1):
            prompt = [chance.randrange(WIDE_KV.vocabulary - 3) for _ in range(TOKENS)]
            for pair, way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                with running(pair.p, pair.d):
                    time.sleep(0.3)
                    row = one_request(pair, way, prompt)
                    time.sleep(0.3)
                words = ", ".join(f"{key} {value:.0f}" for key, value in row.items() if key.endswith("ms"))
                print(f"round {number}: {pair.name} {way}: {words}", file=sys.stderr)
                if number:  # the first one finds memory that was never used
                    found.setdefault((pair.name, way), []).append(row)
    return summary(rounds, found)


def summary(rounds: int, found: dict[tuple[str, str], list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for (name, way), values in found.items():
        row: dict[str, Any] = {"case": f"{name}, {way}", "tokens": TOKENS, "chunk": CHUNK, "rounds": rounds}
        for key in values[0]:
            row[key] = machine.spread([value[key] for value in values], 2 if key.startswith("cpu") else 1)
        rows.append(row)
    by_case = {row["case"]: row for row in rows}
    streamed, sequential = (by_case[f"pd_connector, {way}"] for way in ("streamed", "sequential"))
    after, before = streamed["after_prefill_ms"]["median"], sequential["after_prefill_ms"]["median"]
    streamed["after_prefill_to_sequential"] = round(after / before, 2)
    streamed["after_prefill_less_a_step_ms"] = round(after - streamed["decode_step_ms"]["median"], 1)
    both = (found["pd_connector", way] for way in ("streamed", "sequential"))
    slower = [a["prefill_ms"] / b["prefill_ms"] - 1 for a, b in zip(*both, strict=True)]
    streamed["prefill_slower_percent"] = machine.spread([100 * each for each in slower], 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-nixl", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(arguments.rounds, not arguments.without_nixl, Path(directory))
    machine.report("pd", rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
