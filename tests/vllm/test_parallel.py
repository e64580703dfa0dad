"""Tensor parallelism 2 on both sides: each decode rank reads from its prefill rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import BLOCK, BLOCK_BYTES, LAYERS, Cluster, Gauge, Held, ask, prefill, prompt_of, same, until

from pd_connector.demo.instance import vllm_instance

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_two_ranks_on_each_side(servers: Cluster, tmp_path: Path, model: Path) -> None:
    servers.stop()  # two cores do not carry more
    both, d = (
        vllm_instance(
            name,
            model,
            tmp_path / name,
            role=role,
            extra={"audit": True},
            arguments=("--tensor-parallel-size", "2", "--num-gpu-blocks-override", "32", "--max-model-len", "3072"),
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        for name, role in (("P", "kv_both"), ("D", "kv_consumer"))
    )
    try:
        for server in (both, d):
            server.start()
        for server in (both, d):
            server.wait_ready(350)
        for length in (300, 1000):
            prompt = prompt_of(length, seed=300)
            gauge = Gauge(d)
            got = ask(d, prompt, 6, prefill(both, prompt))
            same(got, ask(both, prompt, 6, cache_salt="plain"))
            blocks = -(-length // BLOCK)
            assert gauge.since("pdc_bytes_transferred_sum") == blocks * BLOCK_BYTES * LAYERS
            assert gauge.since("pdc_bytes_transferred_count") == 2, "one load per rank"
            assert gauge.since("pdc_audit_digests_compared_total") == 2 * blocks * LAYERS
            assert gauge.event("tokens_recomputed") == 0
        for server in (both, d):
            held = Held(server)
            until(held.nothing, 10, lambda held=held: f"{held}")
    finally:
        for server in (both, d):
            server.stop()
