"""Real vLLM servers for tests: one prefill instance, two decode instances (policies recompute and fail), a router.

There is no ``__init__.py`` in this directory on purpose: a package called ``vllm`` would hide the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_connector.demo.instance import Instance, free_port, vllm_instance
from pd_connector.protocol.params import address_of, stream_params, transfer_params
from pd_connector.testing.faults import Rule, read_events, write_script

BLOCK = 128
BLOCKS = 32
"""Small caches: blocks that were freed are soon written over, and pressure is real."""
LAYERS = 4
BLOCK_BYTES = BLOCK * 2 * 64 * 4  # of one layer: kv heads x head size x (K + V) x bfloat16
LEASE_SECONDS = 6.0
VOCABULARY = range(256, 2000)
"""Tokens of prompts: those below are single bytes, of which vLLM makes odd texts."""
LOGPROBS = {"logprobs": 2, "return_tokens_as_token_ids": True}
TIE = 0.2
"""Log-probabilities nearer than this are a tie in bfloat16: D's first token comes from a decode kernel, not from
prefill's. Prompts that are computed in pieces of unlike sizes differ by up to 0.7 there, with or without a transfer."""
READY_SECONDS = 300.0


def prompt_of(length: int, seed: int | str = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(VOCABULARY, k=length)


@dataclass
class Answer:
    tokens: list[int]
    scores: list[float]
    margins: list[float]
    """Log-probability of each token, and how far behind the second best was."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Answer:
        """Of the first choice of a response to a request with LOGPROBS."""
        found = answer["choices"][0]["logprobs"]
        margins = [
            best - min(top.values()) for best, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True)
        ]
        return cls(
            [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"], margins
        )


def body(prompt: Sequence[int], tokens: int, ticket: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    out = {"model": "demo", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    return out if ticket is None else out | {"kv_transfer_params": dict(ticket)}


def ask(server: Instance, prompt: Sequence[int], tokens: int, ticket: Any = None, **more: Any) -> Answer:
    """Decode; with ``ticket`` from its blocks."""
    return Answer.of(server.post("/v1/completions", body(prompt, tokens, ticket, **LOGPROBS, **more)))


def prefill(server: Instance, prompt: Sequence[int], **more: Any) -> dict[str, Any]:
    """The ticket of a prompt."""
    got = server.post("/v1/completions", body(prompt, 1, {"do_remote_decode": True}, **more))
    ticket = got["kv_transfer_params"]
    assert ticket is not None
    return dict(ticket)


def address_between(p: Instance, d: Instance) -> str:
    """Where P's agent answers, as a router learns it: from a ticket, which D takes."""
    prompt = prompt_of(20, seed=time.monotonic_ns())
    ticket = prefill(p, prompt)
    ask(d, prompt, 1, ticket)
    address = address_of(ticket)
    assert address is not None
    return address


class Both:
    """One request at both instances at once, each leg in a thread."""

    def __init__(self, p: Instance, d: Instance, address: str, prompt: list[int], tokens: int = 6) -> None:
        self.transfer = secrets.token_bytes(16)
        self.answer: Answer | None = None
        self.failure: Exception | None = None
        self._p, self._d, self._address, self._prompt, self._tokens = p, d, address, prompt, tokens
        self._threads = [threading.Thread(target=self._prefill), threading.Thread(target=self._decode)]
        for thread in self._threads:
            thread.start()

    def _prefill(self) -> None:
        params = {"do_remote_decode": True} | transfer_params(self.transfer, stream=True)
        with contextlib.suppress(OSError):  # it may be killed under our hands
            self._p.post("/v1/completions", body(self._prompt, 1, params))

    def _decode(self) -> None:
        params = stream_params(self._address, self.transfer)
        try:
            self.answer = ask(self._d, self._prompt, self._tokens, params)
        except Exception as failure:
            self.failure = failure

    def join(self) -> Answer:
        for thread in self._threads:
            thread.join(120)
        if self.failure is not None:
            raise self.failure
        assert self.answer is not None, "no answer in time"
        return self.answer


def same(got: Answer, plain: Answer, tie: float = TIE) -> None:
    """Equal, or equal up to a tie; and until then each token as probable as in the plain run."""
    for at, (ours, theirs) in enumerate(zip(got.tokens, plain.tokens, strict=True)):
        if ours != theirs:
            assert plain.margins[at] < tie, f"token {at}: {ours} instead of {theirs}, which led by {plain.margins[at]}"
            return
        assert abs(got.scores[at] - plain.scores[at]) < 2 * tie, f"token {at}: {got.scores[at]}, {plain.scores[at]}"


class Gauge:
    """What an instance's metrics say, now and since ``mark``."""

    def __init__(self, server: Instance) -> None:
        self._server = server
        self._before = server.metrics()

    def event(self, name: str) -> float:
        """Increase of a counter of the connector since this Gauge was made."""
        key = f'vllm:pdc_events_total{{engine="0",event="{name}",model_name="demo"}}'
        return self._since(key)

    def since(self, name: str) -> float:
        return self._since(f"vllm:{name}")

    def _since(self, key: str) -> float:
        return self._server.metrics().get(key, 0.0) - self._before.get(key, 0.0)

    def wait(self, seconds: float, **events: float) -> None:
        """Until the counters have increased by exactly so much: an engine reports with its next step."""
        until(
            lambda: all(self.event(name) == value for name, value in events.items()),
            seconds,
            lambda: str({name: self.event(name) for name in events}),
        )


def until(done: Callable[[], bool], seconds: float, state: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s {state()}")
        time.sleep(0.05)


class Held:
    """Whatever is leased, being read, quarantined, queued or cached for somebody on an instance."""

    def __init__(self, server: Instance) -> None:
        self._server = server
        self._found: dict[str, float] = {}

    def nothing(self) -> bool:
        """Engines report with their steps, so this makes one, with a request of one token; it reports its end."""
        with contextlib.suppress(urllib.error.HTTPError):
            self._server.post("/v1/completions", body([1], 1, cache_salt=str(time.monotonic())))
        states = ("vllm:pdc_state{", "vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_")
        found = {name: value for name, value in self._server.metrics().items() if name.startswith(states)}
        self._found = {name: value for name, value in found.items() if value and 'state="peers"' not in name}
        return not self._found

    def __str__(self) -> str:
        return f"{self._server.name} still has {self._found}"


class Cluster:
    """P, D (recompute) and F (a second decode instance, policy fail). Reads of D and F follow fault scripts."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.kv_port = free_port()
        self.scripts = {name: directory / f"{name}.script" for name in "DF"}
        common = ("--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "3072", "--max-num-seqs", "16")
        self.p = vllm_instance(
            "P",
            model,
            directory / "P.log",
            role="kv_producer",
            core=0,
            extra={"port": self.kv_port, "lease_seconds": LEASE_SECONDS},
            arguments=(*common, "--shutdown-timeout", "20"),
        )
        self.d, self.f = (
            vllm_instance(
                name,
                model,
                directory / f"{name}.log",
                role="kv_consumer",
                core=1,
                policy=policy,
                extra={
                    "audit": True,
                    "transport": ["faulty"],
                    "transport_options": {"faulty": {"inner": "zmq", "script": str(self.scripts[name])}},
                },
                arguments=common,
            )
            for name, policy in (("D", "recompute"), ("F", "fail"))
        )
        port = free_port()
        command = [sys.executable, "-m", "pd_connector.cli", "router", "--port", str(port)]
        command += ["--prefill", self.p.url, "--decode", self.d.url]
        self.router = Instance("router", command, port, directory / "router.log")

    @property
    def servers(self) -> tuple[Instance, ...]:
        return (self.p, self.d, self.f, self.router)

    def ensure(self) -> None:
        """Start whatever does not run, and wait until all are ready."""
        fresh = [server for server in self.servers if server.process is None or server.process.poll() is not None]
        for server in fresh:
            server.stop()
            server.start()
        deadline = time.monotonic() + READY_SECONDS
        for server in fresh:
            server.wait_ready(max(deadline - time.monotonic(), 1))

    def stop(self) -> None:
        for server in self.servers:
            server.signal(signal.SIGKILL)
        for server in self.servers:
            server.stop()

    def plain(self, prompt: Sequence[int], tokens: int, **more: Any) -> Answer:
        """The right answer: computed by F alone, under a salt that nothing cached or handed over has."""
        return ask(self.f, prompt, tokens, **{"cache_salt": f"plain {time.monotonic()}", **more})

    def check_free(self, *servers: Instance, seconds: float = 5.0) -> None:
        """Within ``seconds`` nothing is held on these (default: all three) any more."""
        for server in servers or (self.p, self.d, self.f):
            found = Held(server)
            until(found.nothing, seconds, lambda found=found: f"{found}")

    @contextlib.contextmanager
    def holding(self, name: str, at: str = "middle", on: str = "post_read") -> Iterator[Callable[[float], None]]:
        """D's or F's next read is held until the end of the block; the value waits for it to be held."""
        script = self.scripts[name]
        before = self._events(name, "held")

        def wait(seconds: float = 60.0) -> None:
            until(lambda: self._events(name, "held") > before, seconds, lambda: f"{name} holds no read")

        write_script(script, Rule(action="hold", on=on, at=at, nth=1, id=str(before)))
        try:
            yield wait
        finally:
            write_script(script)

    def corrupt(self, name: str) -> None:
        """Flip a byte of the next read."""
        write_script(self.scripts[name], Rule(action="corrupt", nth=1, id=str(self._events(name, "corrupted"))))

    def heal(self) -> None:
        for script in self.scripts.values():
            write_script(script)

    def _events(self, name: str, event: str) -> int:
        return sum(entry["event"] == event for entry in read_events(self.scripts[name]))


def engine_core(server: Instance) -> int:
    """Process id of a server's engine core, the child that holds scheduler and queues."""
    assert server.process is not None
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            name = (entry / "cmdline").read_bytes()
            if name.startswith(b"VLLM::EngineCore") and os.getpgid(int(entry.name)) == server.process.pid:
                return int(entry.name)
    raise LookupError(f"no engine core in the process group of {server.name}")


def error_of(failure: urllib.error.HTTPError) -> str:
    found: dict[str, Any] = json.loads(failure.read())
    return str(found["error"]["message"])
