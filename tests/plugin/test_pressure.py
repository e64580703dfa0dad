"""Too little cache: preemption on both sides, loads that wait for room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine import reference
from .pair import PREFILL, Pair, words


def test_preemption_on_the_decode_side(engine: Callable[..., Any]) -> None:
    """A preempted request is computed again, not loaded again, and its freed blocks are nobody's problem."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer", blocks=14, enable_prefix_caching=False))
    prompts = {f"r{seed}": words(60, seed) for seed in range(3)}
    for name, prompt in prompts.items():
        pair.decode.add(name, prompt, tokens=60, params=pair.ticket(name, prompt))
    pair.until(lambda: len(pair.decode.ended) == 3, seconds=30)
    assert any(pair.decode._requests[name].num_preemptions for name in prompts)
    for name, prompt in prompts.items():
        assert pair.decode.tokens[name] == reference(prompt, 60), name
    assert [t["outcome"] for t in pair.decode.transfers] == ["done"] * 3
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0, "what was loaded once is not a silent prefill"
    pair.settle()


def test_preemption_on_the_prefill_side(engine: Callable[..., Any]) -> None:
    pair = Pair(
        engine("kv_producer", blocks=12, budget=32, max_num_seqs=8, enable_prefix_caching=False), engine("kv_consumer")
    )
    prompts = {f"r{seed}": words(100, seed) for seed in range(4)}
    pair.prefill.add("long", words(60, 9), tokens=60)
    for name, prompt in prompts.items():
        pair.prefill.add(name, prompt, params=PREFILL)
        pair.decode.add(name + "-plain", prompt[:5], tokens=2)
    served: set[str] = set()

    def hand_over() -> bool:
        for name in prompts.keys() & pair.prefill.ended.keys() - served:
            served.add(name)
            pair.decode.add(name, prompts[name], tokens=3, params=pair.prefill.params[name])
        return prompts.keys() <= pair.decode.ended.keys() and "long" in pair.prefill.ended

    pair.until(hand_over, seconds=30)
    assert any(request.num_preemptions for request in pair.prefill._requests.values())
    for name, prompt in prompts.items():
        assert pair.decode.tokens[name] == reference(prompt, 3), name
    assert pair.prefill.tokens["long"] == reference(words(60, 9), 60)
    assert [t["outcome"] for t in pair.decode.transfers] == ["done"] * 4
    pair.settle()


def test_loads_wait_for_room(engine: Callable[..., Any]) -> None:
    """D has room for one prompt at a time, P for all of them."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer", blocks=10, enable_prefix_caching=False))
    prompts = {f"r{seed}": words(100, seed) for seed in range(4)}
    for name, prompt in prompts.items():
        pair.decode.add(name, prompt, tokens=3, params=pair.ticket(name, prompt))
    pair.until(lambda: len(pair.decode.ended) == 4, seconds=30)
    for name, prompt in prompts.items():
        assert pair.decode.tokens[name] == reference(prompt, 3), name
    assert [t["outcome"] for t in pair.decode.transfers] == ["done"] * 4
    pair.settle()


def test_leases_that_fill_the_cache_make_new_prefills_wait(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer", blocks=16, enable_prefix_caching=False), engine("kv_consumer"))
    prompts = {f"r{seed}": words(100, seed) for seed in range(3)}
    for name, prompt in prompts.items():
        pair.prefill.add(name, prompt, params=PREFILL)
    pair.until(lambda: {"r0", "r1"} <= pair.prefill.ended.keys())
    for _ in range(20):
        pair.prefill.step()
    assert "r2" not in pair.prefill.ended
    for name in prompts:
        pair.until(lambda name=name: name in pair.prefill.ended)
        pair.decode.add(name, prompts[name], tokens=3, params=pair.prefill.params[name])
    pair.until(lambda: len(pair.decode.ended) == 3)
    for name, prompt in prompts.items():
        assert pair.decode.tokens[name] == reference(prompt, 3), name
    pair.settle()
