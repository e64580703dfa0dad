"""One prompt through P/D and plain, and what P, D and the router themselves say about it.

Only one request is under way at a time, so the growth of a Prometheus sum over it is that request's own value.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_connector.demo.client import Answer, ask
from pd_connector.demo.deployment import Deployment
from pd_connector.demo.instance import Instance, InstanceFailed
from pd_connector.demo.verdict import STAGES, Row, compare, kv_bytes

_METRICS_S = 10.0
"""Counts travel to /metrics with the engine's next output: some milliseconds, on a loaded machine more."""
_POLL_S = 0.05
_PREFILLS = "vllm:request_prefill_time_seconds_count"
_LOADS = "vllm:pdc_bytes_transferred_count"
_FAILED = "vllm:pdc_num_failed_transfers_total"
_BLOCK_SIZE = re.compile(r'^vllm:cache_config_info\{.*\bblock_size="(\d+)"')
_READ_OVER = re.compile(r"peer \S+ is read over (\S+) \((.*)\)")


class Growth:
    """How much one instance's metrics have grown since this was made, as of the last ``look``."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._now = self._before = instance.metrics()

    def look(self) -> None:
        self._now = self._instance.metrics()

    def of(self, name: str, label: str = "") -> float:
        """Over all samples of a name, or those with one label such as ``source="local_compute"``."""
        return _total(self._now, name, label) - _total(self._before, name, label)


class Bench:
    """A running deployment and what is constant about it. Raises InstanceFailed when P and D do not say it."""

    def __init__(self, deployment: Deployment, timeout: float) -> None:
        self._deployment = deployment
        self._timeout = timeout
        self._model: dict[str, Any] = json.loads((deployment.model / "config.json").read_text())
        sizes = {_block_tokens(instance) for instance in (deployment.prefill, deployment.decode)}
        if len(sizes) != 1:
            raise InstanceFailed(f"P and D have different block sizes: {sorted(sizes)} tokens")
        self._block_tokens = sizes.pop()

    def measure(self, prompt: Sequence[int]) -> Row:
        """The prompt through the router, then plain on P: in this order, so that D can know nothing of it yet. The
        plain run may not use what P's prefix cache keeps of the first one: it computes everything anew."""
        here = self._deployment
        p, d = Growth(here.prefill), Growth(here.decode)
        expected = kv_bytes(len(prompt), self._block_tokens, self._model)
        handed = ask(here.router, prompt, timeout=self._timeout)
        _settle(p, d, loads=1 if expected else 0)
        plain = ask(here.prefill, prompt, timeout=self._timeout, fresh=True)
        # The last prompt token is always computed here. The connector counts what the scheduler gave the model to do,
        # vLLM what it did not find in any cache: the demo believes the worse of the two.
        computed = d.of("vllm:prompt_tokens_by_source_total", 'source="local_compute"')
        recomputed = max(d.of("vllm:pdc_recomputed_tokens_total"), computed - 1)
        return Row(
            prompt_tokens=len(prompt),
            mismatch=compare(plain, handed),
            digests_compared=int(d.of("vllm:pdc_audit_digests_compared_total")),
            failed_transfers=int(d.of(_FAILED)),
            recomputed_tokens=int(recomputed),
            kv_bytes=int(d.of("vllm:pdc_bytes_transferred_sum")),
            kv_bytes_expected=expected,
            transport=chosen_transport(here.decode.log)[0] if d.of(_LOADS) else "none",
            ttft_ms=ledger(handed),
            plain_ttft_ms=1e3 * plain.ttft_s,
        )


def ledger(answer: Answer) -> dict[str, float]:
    """Where the time to the first token went, in ms, as the router's Server-Timing header has it from all three (see
    router/ledger.py). ``unaccounted`` is what the client's own clock saw beyond that, so they add up to it."""
    stages = {stage: answer.stages_ms.get(stage, 0.0) for stage in STAGES if stage != "unaccounted"}
    return {**stages, "unaccounted": max(0.0, 1e3 * answer.ttft_s - sum(stages.values()))}


def chosen_transport(log: Path) -> tuple[str, str]:
    """Over what D reads from P, and the reason against every other transport, as D logged it at first contact."""
    found = _READ_OVER.findall(log.read_text(errors="replace"))
    return found[-1] if found else ("unknown", "D's log does not say")


def _settle(p: Growth, d: Growth, loads: int) -> None:
    """Wait until both requests and D's load are counted. Past the deadline the counts stand as they are: a load that
    never took place is a verdict, not an error."""
    deadline = time.monotonic() + _METRICS_S
    while time.monotonic() < deadline:
        p.look()
        d.look()
        if p.of(_PREFILLS) >= 1 and d.of(_PREFILLS) >= 1 and d.of(_LOADS) + d.of(_FAILED) >= loads:
            return
        time.sleep(_POLL_S)


def _block_tokens(instance: Instance) -> int:
    for sample in instance.metrics():
        if match := _BLOCK_SIZE.match(sample):
            return int(match[1])
    raise InstanceFailed(f"{instance.name} does not tell its block size: no vllm:cache_config_info at /metrics")


def _total(samples: dict[str, float], name: str, label: str) -> float:
    return sum(value for sample, value in samples.items() if sample.startswith(f"{name}{{") and label in sample)
