"""Long prompts go to a real prefill and a real decode instance at once: D reads while P computes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import BLOCK, LOGPROBS, Answer, Both, Gauge, Held, ask, body, prompt_of, same, until

from pd_connector.demo.instance import Instance, free_port, vllm_instance
from pd_connector.demo.model import ModelShape, build_model
from pd_connector.protocol.params import stream_params, transfer_params
from pd_connector.router.show import fetch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(500)]

CHUNK = 256
PROMPT = 10 * CHUNK + 37
PREFILL = {"do_remote_decode": True}
GENERATED = 'generation_tokens_total{engine="0",model_name="demo"}'
TIE = 0.01
"""Log-probabilities of float32."""
SLOW = ModelShape(layers=12, hidden=512, heads=8)
"""A chunk takes long enough for a test to step in between two of them."""


@dataclass
class Pair:
    """A prefill instance that computes 256 tokens per step, a decode instance, and their address for each other."""

    p: Instance
    d: Instance
    address: str

    def plain(self, prompt: list[int], tokens: int = 6) -> Answer:
        """Computed by D alone, under a salt that nothing was handed over with."""
        return ask(self.d, prompt, tokens, cache_salt=f"plain {time.monotonic()}")

    def same(self, answer: Answer, prompt: list[int]) -> None:
        same(answer, self.plain(prompt), TIE)

    def both(self, prompt: list[int]) -> Both:
        return Both(self.p, self.d, self.address, prompt)

    def free(self, seconds: float = 5.0) -> None:
        for server in (self.p, self.d):
            found = Held(server)
            until(found.nothing, seconds, lambda found=found: f"{found}")


@pytest.fixture(scope="module")
def servers_along(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory, port = tmp_path_factory.mktemp("along"), free_port()
    model = build_model(directory / "model", SLOW)
    # Prompts that share steps are cut where it falls: in float32 that makes no difference to be seen.
    common = ("--num-gpu-blocks-override", "32", "--max-model-len", "3072", "--max-num-seqs", "16")
    common = (*common, "--max-num-batched-tokens", str(CHUNK), "--dtype", "float32")
    p = vllm_instance(
        "P", model, directory / "P.log", role="kv_both", core=0,
        extra={"port": port, "lease_seconds": 6.0, "audit": True}, arguments=(*common, "--no-enable-prefix-caching"),
    )  # fmt: skip
    d = vllm_instance(
        "D", model, directory / "D.log", role="kv_consumer", core=1, policy="recompute",
        extra={"audit": True, "pool_bytes": 512 << 20}, arguments=common,
    )  # fmt: skip
    pair = Pair(p, d, f"tcp://127.0.0.1:{port}")
    for server in (p, d):
        server.start()
    yield pair
    for server in (p, d):
        server.signal(signal.SIGKILL)
        server.stop()


@pytest.fixture
def along(servers_along: Pair) -> Pair:
    p = servers_along.p
    if p.process is None or p.process.poll() is not None:
        p.stop()
        p.start()
    for server in (p, servers_along.d):
        server.wait_ready(300)
    return servers_along


@pytest.mark.parametrize("length", [31, 129, CHUNK, PROMPT])
def test_read_along(along: Pair, length: int) -> None:
    prompt = prompt_of(length, seed="along")
    d = Gauge(along.d)
    got = along.both(prompt).join()
    d.wait(5, transfers_done=1, tokens_recomputed=0)
    assert d.since("pdc_audit_digests_compared_total") == -(-length // BLOCK) * SLOW.layers
    along.same(got, prompt)
    along.free()


def test_several_along(along: Pair) -> None:
    prompts = [prompt_of(600, seed=f"several {n}") for n in range(4)]
    d = Gauge(along.d)
    running = [along.both(prompt) for prompt in prompts]
    answers = [both.join() for both in running]
    d.wait(5, transfers_done=4, tokens_recomputed=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        along.same(answer, prompt)
    along.free()


@contextlib.contextmanager
def router_before(pair: Pair, directory: Path) -> Iterator[Instance]:
    port = free_port()
    command = [sys.executable, "-m", "pd_connector.cli", "router", "--port", str(port)]
    command += ["--prefill", pair.p.url, "--decode", pair.d.url]
    router = Instance("router", command, port, directory / "router.log")
    router.start()
    try:
        router.wait_ready(60)
        yield router
    finally:
        router.stop()


def send(server: Instance, path: str, asked: dict[str, Any], **headers: str) -> bytes:
    data = json.dumps(asked).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def test_through_the_router(along: Pair, tmp_path: Path) -> None:
    """It learns P's address from the first answer, and streams from then on."""
    with router_before(along, tmp_path) as router:
        d, answers = Gauge(along.d), []
        for seed in ("sequential", "streamed"):
            prompt = prompt_of(PROMPT, seed=seed)
            answers.append((prompt, ask(router, prompt, 6)))
            ways = {name: value for name, value in router.metrics().items() if "hand_overs_total" in name}
            assert any(f'mode="{seed}"' in name and value == 1 for name, value in ways.items()), ways
        d.wait(5, transfers_done=2, tokens_recomputed=0)
        for prompt, answer in answers:
            along.same(answer, prompt)
    along.free()


def test_the_ledger_of_a_hundred_requests(along: Pair, tmp_path: Path) -> None:
    """Short and long, streamed and whole, four at a time: where the time went is known of each."""
    lengths = [20, 90, 129, 200, 300, 20, 60, 257, 150, 1100] * 10
    d = Gauge(along.d)
    with router_before(along, tmp_path) as router, ThreadPoolExecutor(4) as pool:

        def request(number: int) -> None:
            prompt = prompt_of(lengths[number], seed=f"ledger {number}")
            send(router, "/v1/completions", body(prompt, 2, stream=number % 3 != 0))

        for waiting in [pool.submit(request, number) for number in range(100)]:
            waiting.result(timeout=120)
        until(lambda: len(fetch(router.url, 1000, None)) == 100, 10)
        ledgers = fetch(router.url, 1000, None)
        d.wait(5, transfers_done=100, tokens_recomputed=0)
        shown = subprocess.run(
            [sys.executable, "-m", "pd_connector.cli", "ledger", router.url, "--plot", str(tmp_path / "ledger.png")],
            capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
    worst = max(ledgers, key=lambda ledger: ledger["unaccounted_ms"] / ledger["ttft_ms"])
    assert worst["unaccounted_ms"] <= 0.02 * worst["ttft_ms"], worst
    assert sorted(ledger["tokens"]["prompt"] for ledger in ledgers) == sorted(lengths)
    for ledger in ledgers:
        assert (ledger["missing"], ledger["other_clocks"]) == ([], []), ledger
        assert ledger["tokens"]["loaded"] == ledger["tokens"]["expected"] == ledger["tokens"]["prompt"], ledger
        stages = ledger["stages_ms"]
        assert all(stages[stage] > 0 for stage in ("router", "p_queue", "prefill", "d_queue", "first_token")), ledger
        assert ledger["reading_ms"] > 0, ledger
        assert stages["wire"] > 0 or ledger["hand_over"].startswith("streamed"), ledger
    assert {ledger["hand_over"].partition(":")[0] for ledger in ledgers} == {"sequential", "streamed"}
    assert "median" in shown.stdout
    assert (tmp_path / "ledger.png").stat().st_size > 1000
    along.free()


@pytest.mark.parametrize("kind", ["continued", "edited", "chat"])
def test_the_second_turn_is_read_from_the_decode_instance(along: Pair, tmp_path: Path, kind: str) -> None:
    """P has no prefix cache. It reads what D kept of the first turn, and hands all of it over again, what D's decode
    steps computed too unless the client edited the end."""
    prompt = prompt_of(PROMPT - 500, seed=f"turns {kind}")
    p, d, history = Gauge(along.p), Gauge(along.d), []
    with router_before(along, tmp_path) as router:
        for turn in range(2):
            if kind == "chat":
                history.append({"role": "user", "content": " ".join(map(str, prompt[: 20 if turn else 300]))})
                told = {"model": "demo", "messages": history, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                got = json.loads(send(router, "/v1/chat/completions", told))
                history.append({"role": "assistant", "content": got["choices"][0]["message"]["content"]})
                continue
            got = json.loads(
                send(router, "/v1/completions", body(prompt, 6, **LOGPROBS), **{"x-pdc-conversation": "talk"})
            )
            answer, asked = Answer.of(got), prompt
            prompt = [*prompt, *answer.tokens] if kind == "continued" else prompt[:-5]
            prompt += prompt_of(100, seed=f"next {turn}")
        until(lambda: len(fetch(router.url, 1000, None)) == 2, 10)
        first, second = (ledger["tokens"] for ledger in fetch(router.url, 1000, None))
    assert first["reused"] == 0
    assert second["reused"] >= 0.9 * first["prompt"], second
    assert second["loaded"] == second["expected"] == second["prompt"] - second["cached"]
    p.wait(5, transfers_done=1)
    d.wait(5, turns_kept=2, tokens_recomputed=0)
    assert p.since("pdc_audit_digests_compared_total") == -(-second["reused"] // BLOCK) * SLOW.layers
    if kind == "continued":
        assert second["reused"] == first["prompt"] + 5
    if kind != "chat":
        along.same(answer, asked)
    along.free()


def test_preempted_midway(along: Pair) -> None:
    """Requests that decode on P grow into the blocks of the prefill: old READYs are void, the tokens are right. Eleven
    blocks fit beside five requests of four, but not when these need a fifth one, 32 tokens on."""
    d = Gauge(along.d)
    for done, decoded in enumerate((100, 110, 90, 120, 80, 130), 1):
        fillers = [
            threading.Thread(target=ask, args=(along.p, prompt_of(480, seed=f"{decoded} {n}"), 60)) for n in range(5)
        ]
        now = Gauge(along.p)
        for filler in fillers:
            filler.start()
        # The first of them has about a quarter of these.
        until(lambda now=now, decoded=decoded: now.since(GENERATED) >= decoded, 60)
        prompt = prompt_of(11 * BLOCK - 5, seed=f"preempted {decoded}")
        got = along.both(prompt).join()
        for filler in fillers:
            filler.join(120)
        d.wait(5, transfers_done=done, tokens_recomputed=0)
        along.same(got, prompt)
        if d.event("transfers_failed"):
            break
    assert d.event("transfers_failed") > 0, "the epoch that was being read has ended"
    along.free()


def test_decode_leaves_midway_or_while_it_waits(along: Pair) -> None:
    prompt = prompt_of(PROMPT, seed="leave")
    for prefill in (False, True):
        transfer = secrets.token_bytes(16)
        thread = threading.Thread(
            target=along.p.post,
            args=("/v1/completions", body(prompt, 1, PREFILL | transfer_params(transfer, stream=True))),
        )
        if prefill:
            thread.start()
        with contextlib.suppress(TimeoutError, urllib.error.URLError):
            params = stream_params(along.address, transfer)
            along.d.post("/v1/completions", body(prompt, 4, params), timeout=0.4)
        if prefill:
            thread.join(60)
        along.free()


@pytest.mark.parametrize("part", [5, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 3, 7, 8))])
def test_prefill_dies_midway(along: Pair, part: int) -> None:
    """At five different READY points: right tokens, and no more recomputed than was not confirmed."""
    prompt = prompt_of(PROMPT, seed=f"dies {part}")
    d = Gauge(along.d)
    both = along.both(prompt)
    until(lambda: d.event("parts_confirmed") >= part, 60)
    along.p.signal(signal.SIGKILL)
    got = both.join()
    d.wait(5, transfers_failed=1)
    recomputed = d.event("tokens_recomputed")
    along.same(got, prompt)
    assert 0 < recomputed <= PROMPT - part * CHUNK, f"{recomputed} recomputed after part {part}"
