"""Prefill and decode instances that are not alike, and models whose KV is more than one kind of block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from models import build
from serving import Both, Cluster, Gauge, Held, address_between, ask, prefill, prompt_of, same, until

from pd_connector.demo.instance import Instance, vllm_instance

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(500)]

BOTH_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
COMMON = ("--max-model-len", "2000", "--max-num-batched-tokens", "512")


@contextlib.contextmanager
def running(model: Path, tmp_path: Path, *arguments: Sequence[str]) -> Iterator[list[Instance]]:
    """Two instances that can each be either side; more than one rank takes both cores."""
    instances = [
        vllm_instance(
            f"{'AB'[index]}",
            model,
            tmp_path / f"{index}.log",
            role="kv_both",
            core=None if "--tensor-parallel-size" in more else index,
            extra={"audit": True},
            arguments=(*COMMON, *more),
            environment=BOTH_CORES if "--tensor-parallel-size" in more else {},
        )
        for index, more in enumerate(arguments)
    ]
    try:
        for instance in instances:
            instance.start()
        for instance in instances:
            instance.wait_ready(400)
        yield instances
        for instance in instances:
            held = Held(instance)
            until(held.nothing, 10, lambda held=held: f"{held}")
    finally:
        for instance in instances:
            instance.stop()


def hand_over(p: Instance, d: Instance, length: int, ranks: int = 1, seed: int = 1, along: bool = False) -> bool:
    """The answer is right in any case. False when a rank starved longer than the protocol waits (several busy ranks on
    two cores); otherwise every byte was compared, and nothing computed twice. ``along``: D reads while P computes."""
    prompt = prompt_of(length, seed=f"along {seed}" if along else seed)
    address = address_between(p, d) if along else ""
    gauge = Gauge(d)
    got = Both(p, d, address, prompt).join() if along else ask(d, prompt, 6, prefill(p, prompt))
    same(got, ask(d, prompt, 6, cache_salt="plain"))
    if gauge.event("transfers_done") < ranks:
        return False
    assert gauge.event("tokens_recomputed") == 0
    assert gauge.since("pdc_audit_digests_compared_total") > 0
    assert gauge.event("transfers_failed") == 0
    return True


@pytest.mark.slow
def test_two_ranks_and_one(servers: Cluster, model: Path, tmp_path: Path) -> None:
    """Heads are gathered from two ranks, and divided among two."""
    servers.stop()  # two cores do not carry more
    blocks = ("--num-gpu-blocks-override", "32")
    with running(model, tmp_path, ("--tensor-parallel-size", "2", *blocks), blocks) as (two, one):
        for length in (300, 1000):
            assert any(hand_over(two, one, length, seed=seed) for seed in range(4))
            assert any(hand_over(one, two, length, ranks=2, seed=seed) for seed in range(4))
        assert any(hand_over(two, one, 1400, seed=seed, along=True) for seed in range(4))
        assert any(hand_over(one, two, 1400, ranks=2, seed=seed, along=True) for seed in range(4))


@pytest.mark.slow
def test_small_blocks_and_large_ones(servers: Cluster, model: Path, tmp_path: Path) -> None:
    servers.stop()
    sizes = (
        ("--block-size", size, "--num-gpu-blocks-override", count) for size, count in (("32", "128"), ("128", "32"))
    )
    with running(model, tmp_path, *sizes) as (small, large):
        for length in (31, 300, 1000):
            assert hand_over(small, large, length)
            assert hand_over(large, small, length, seed=2)
        assert hand_over(small, large, 1400, along=True)
        assert hand_over(large, small, 1400, along=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "deepseek", "qwen3-next"])
def test_models_of_other_kinds(servers: Cluster, model: Path, tmp_path: Path, kind: str) -> None:
    """Sliding windows, a latent, and states beside attention."""
    servers.stop()
    other = build(kind, model, tmp_path / kind)
    with running(other, tmp_path, *((("--num-gpu-blocks-override", "200"),) * 2)) as (p, d):
        gauge = Gauge(d)
        for length in (2, 128, 257, 300, 1024, 1900):
            assert hand_over(p, d, length)
        if kind == "gemma3":  # far less than all blocks of all layers
            whole = 6 * 131072 * sum(-(-length // 128) for length in (2, 128, 257, 300, 1024, 1900))
            assert gauge.since("pdc_bytes_transferred_sum") < 0.6 * whole
        for length in (2, 300, 1900):
            assert hand_over(p, d, length, along=True)
