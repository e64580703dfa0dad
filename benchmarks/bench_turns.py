"""The second turn of a conversation through real vLLM P/D: read from what D kept of the first one, or computed again.

A history of 3,000 tokens (56 KiB of KV each, 172 MB), an answer of 16, a question of 100. One core for P, one for D;
neither has a prefix cache, so whatever P does not compute it has read from D's pool. Both ways take turns, each over a
conversation of its own. Times are the client's clock.

    python benchmarks/bench_turns.py [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import machine
from bench_handover import READY_SECONDS, cpu_seconds, small_cache

from pd_connector.demo.instance import Instance, free_port, vllm_instance
from pd_connector.demo.model import WIDE_KV, build_model
from pd_connector.router.show import fetch

HISTORY, ANSWER, QUESTION, CHUNK = 3000, 16, 100, 512
Deployment = tuple[Instance, Instance, Instance]


def deploy(directory: Path, stack: contextlib.ExitStack) -> Deployment:
    model = build_model(directory / "model", WIDE_KV)
    room = small_cache(HISTORY + ANSWER + QUESTION + CHUNK)
    more = [*room, "--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK)]
    pool = {"pool_bytes": 1 << 30, "io_cpus": [1]}
    sides = (
        vllm_instance("P", model, directory / "P.log", role="kv_both", core=0, arguments=more, extra={"io_cpus": [0]}),
        vllm_instance("D", model, directory / "D.log", role="kv_consumer", core=1, arguments=more, extra=pool),
    )
    port = free_port()
    command = [sys.executable, "-m", "pd_connector.cli", "router", "--port", str(port)]
    command += ["--prefill", sides[0].url, "--decode", sides[1].url]
    router = Instance("router", command, port, directory / "router.log")
    for instance in (*sides, router):
        stack.callback(instance.stop)
        instance.start()
    for instance in (*sides, router):
        instance.wait_ready(READY_SECONDS)
    return (*sides, router)


def turn(router: Instance, prompt: list[int], name: str) -> tuple[float, list[int]]:
    """(seconds to the first token, the answer)."""
    body = {
        "model": "demo", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    host = urlsplit(router.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=300)
    start, first, tokens = time.monotonic(), 0.0, []
    headers = {"content-type": "application/json", "x-pdc-conversation": name}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {"):
            first = first or time.monotonic()
            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    connection.close()
    if answer.status != 200 or len(tokens) != ANSWER:
        raise RuntimeError(f"the router answered {answer.status} with {len(tokens)} tokens")
    return first - start, tokens


def measure(rounds: int, directory: Path) -> list[dict[str, Any]]:
    chance = random.Random(1)
    found: dict[str, list[dict[str, float]]] = {"read": [], "computed": []}

    def words(count: int) -> list[int]:
        return [chance.randrange(WIDE_KV.vocabulary - 3) for _ in range(count)]

    with contextlib.ExitStack() as stack:
        p, d, router = deploy(directory, stack)
        for number in range(rounds + 1):
            for way in ("read", "computed") if number % 2 else ("computed", "read"):
                history, name = words(HISTORY), f"{number} {way}"
                before, answer = turn(router, history, name)
                time.sleep(1.0)
                cpu = cpu_seconds(p), cpu_seconds(d)
                after, _ = turn(router, [*history, *answer, *words(QUESTION)], name if way == "read" else "another")
                time.sleep(0.3)
                ledger = fetch(router.url, 1, None)[0]
                reused = ledger["tokens"]["reused"]
                if bool(reused) != (way == "read"):
                    raise RuntimeError(f"{reused} tokens were reused when the prefix was to be {way}")
                row = {
                    "first_ttft_ms": 1e3 * before, "ttft_ms": 1e3 * after, "reused_share": reused / HISTORY,
                    "p_ms": ledger["stages_ms"]["p_queue"] + ledger["stages_ms"]["prefill"],
                    "cpu_p_s": cpu_seconds(p) - cpu[0], "cpu_d_s": cpu_seconds(d) - cpu[1],
                }  # fmt: skip
                print(f"round {number}: {way}: {before:.2f} s, then {after:.3f} s", file=sys.stderr)
                if number:  # the first one finds memory that was never used
                    found[way].append(row)
    rows = []
    for way, values in found.items():
        row_: dict[str, Any] = {"case": f"the prefix is {way}", "history": HISTORY, "rounds": rounds}
        for key in values[0]:
            row_[key] = machine.spread([value[key] for value in values], 3 if key.endswith("share") else 2)
        rows.append(row_)
    pairs = zip(found["read"], found["computed"], strict=True)
    rows[0]["ttft_to_computed"] = machine.spread([a["ttft_ms"] / b["ttft_ms"] for a, b in pairs])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(arguments.rounds, Path(directory))
    machine.report("turns", rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
