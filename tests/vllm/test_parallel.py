"""Tensor parallelism 2 on both sides: each decode rank reads from its prefill rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import (
    BLOCK,
    BLOCK_BYTES,
    LAYERS,
    Both,
    Cluster,
    Gauge,
    Held,
    address_between,
    ask,
    prefill,
    prompt_of,
    same,
    until,
)

from pd_connector.demo.instance import Instance, vllm_instance

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def loaded_by_both(p: Instance, d: Instance, prompt: list[int]) -> bool:
    """The answer is right in any case. Four busy workers on two cores may starve longer, at first or later, than the
    protocol waits; then a rank computes its half itself, and this is False."""
    gauge = Gauge(d)
    same(ask(d, prompt, 6, prefill(p, prompt)), ask(p, prompt, 6, cache_salt="plain"))
    if gauge.event("transfers_done") < 2:
        assert gauge.event("tokens_recomputed") == len(prompt) - 1, "one rank's half is not used without the other's"
        return False
    blocks = -(-len(prompt) // BLOCK)
    assert gauge.since("pdc_bytes_transferred_sum") == blocks * BLOCK_BYTES * LAYERS
    assert gauge.since("pdc_bytes_transferred_count") == 2, "one load per rank"
    assert gauge.since("pdc_audit_digests_compared_total") == 2 * blocks * LAYERS
    assert gauge.event("tokens_recomputed") == 0
    return True


def read_along_by_both(p: Instance, d: Instance, prompt: list[int]) -> bool:
    """As above, but D's ranks read while P's compute."""
    address = address_between(p, d)
    gauge = Gauge(d)
    same(Both(p, d, address, prompt).join(), ask(p, prompt, 6, cache_salt="plain"))
    return gauge.event("transfers_done") == 2 and gauge.event("tokens_recomputed") == 0


@pytest.mark.slow
def test_two_ranks_on_each_side(servers: Cluster, tmp_path: Path, model: Path) -> None:
    servers.stop()  # two cores do not carry more
    both, d = (
        vllm_instance(
            name,
            model,
            tmp_path / name,
            role=role,
            extra={"audit": True},
            arguments=(
                *("--tensor-parallel-size", "2", "--num-gpu-blocks-override", "32", "--max-model-len", "3072"),
                *("--max-num-batched-tokens", "512"),
            ),
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        for name, role in (("P", "kv_both"), ("D", "kv_consumer"))
    )
    try:
        for server in (both, d):
            server.start()
        for server in (both, d):
            server.wait_ready(350)
        assert any(loaded_by_both(both, d, prompt_of(300, seed=seed)) for seed in range(4))
        assert any(loaded_by_both(both, d, prompt_of(1000, seed=seed)) for seed in range(4))
        assert any(read_along_by_both(both, d, prompt_of(2000, seed=seed)) for seed in range(4))
        for server in (both, d):
            held = Held(server)
            until(held.nothing, 10, lambda held=held: f"{held}")
    finally:
        for server in (both, d):
            server.stop()
