"""One prompt after another from P to D: tokens, bytes, partial prefixes, leases."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from .engine import BLOCK, LAYERS, reference
from .pair import PREFILL, Pair, words

BLOCK_BYTES = BLOCK * 16 * LAYERS


@pytest.fixture
def pair(engine: Callable[..., Any]) -> Pair:
    return Pair(engine("kv_producer"), engine("kv_consumer", {"audit": True}))


def test_every_length_arrives_whole(pair: Pair) -> None:
    for seed, length in enumerate((2, BLOCK - 1, BLOCK, BLOCK + 1, 31, 128, 129, 700)):
        prompt = words(length, seed)
        name = f"r{length}"
        params = pair.ticket(name, prompt)
        assert pair.decode_all(name, prompt, params) == reference(prompt, 3), length
        moved = pair.decode.transfers[-1]
        assert moved["outcome"] == "done"
        assert moved["bytes"] == -(-length // BLOCK) * BLOCK_BYTES
        assert moved["compared"] == -(-length // BLOCK) * LAYERS
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_bytes_on_the_decode_side_are_those_of_the_prefill_side(pair: Pair) -> None:
    prompt = words(100)
    params = pair.ticket("r", prompt)
    (source,) = params["remote_block_ids"]
    sent = pair.prefill.words[:, source].flatten(1, 2)[:, :100].clone()
    assert sent.any()
    pair.decode.add("r", prompt, tokens=2, params=params)
    pair.until(lambda: bool(pair.decode.tokens.get("r")))
    (target,) = pair.decode.scheduler.kv_cache_manager.get_block_ids("r")
    assert (pair.decode.words[:, target].flatten(1, 2)[:, :100] == sent).all()
    pair.until(lambda: "r" in pair.decode.ended)
    pair.settle()


def test_a_prompt_of_one_token_is_computed_not_loaded(pair: Pair) -> None:
    params = pair.ticket("r", [5])
    assert pair.decode_all("r", [5], params) == reference([5], 3)
    assert pair.decode.transfers == []
    pair.settle(seconds=2)


def test_a_local_prefix_is_not_read_again(pair: Pair) -> None:
    first, second = words(96), [*words(96), *words(40, seed=1)]
    pair.decode_all("a", first, pair.ticket("a", first))
    params = pair.ticket("b", second)
    assert pair.decode_all("b", second, params) == reference(second, 3)
    assert [t["bytes"] for t in pair.decode.transfers] == [6 * BLOCK_BYTES, 3 * BLOCK_BYTES]
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_a_prompt_that_is_all_local_gives_its_ticket_back(pair: Pair) -> None:
    prompt = words(8 * BLOCK + 1)
    pair.decode_all("a", prompt, pair.ticket("a", prompt))
    params = pair.ticket("b", prompt)
    started = time.monotonic()
    assert pair.decode_all("b", prompt, params) == reference(prompt, 3)
    pair.settle(seconds=5)
    assert time.monotonic() - started < 5, "the lease must not have to run out"
    assert len(pair.decode.transfers) == 1
    assert pair.decode.counters["tickets_not_needed"] == 1


def test_prefix_cache_of_the_prefill_side(pair: Pair) -> None:
    """P's second lease shares blocks with what its first request left in the cache."""
    prompt = words(100)
    for name in ("a", "b"):
        params = pair.ticket(name, prompt, cache_salt=None)
        pair.decode.scheduler.reset_prefix_cache()
        assert pair.decode_all(name, prompt, params) == reference(prompt, 3)
    assert [t["bytes"] for t in pair.decode.transfers] == [7 * BLOCK_BYTES] * 2
    pair.settle()


def test_two_leases_over_shared_blocks_are_freed_one_by_one(pair: Pair) -> None:
    prompt = words(100)
    first, second = pair.ticket("a", prompt), pair.ticket("b", prompt)
    shared = set(first["remote_block_ids"][0]) & set(second["remote_block_ids"][0])
    assert shared
    pair.decode_all("a", prompt, first)
    pair.until(lambda: pair.prefill.gauges["leases"] == 1)
    pair.decode.scheduler.reset_prefix_cache()
    # The blocks of b must still be there although a's are free and other requests come.
    for seed in range(1, 8):
        pair.prefill.add(f"other{seed}", words(100, seed))
        pair.until(lambda name=f"other{seed}": name in pair.prefill.ended)
    assert pair.decode_all("b", prompt, second) == reference(prompt, 3)
    pair.settle()


def test_chunked_prefill_is_leased_once_it_is_whole(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer", budget=64, max_num_seqs=8), engine("kv_consumer"))
    prompt = words(300)
    params = pair.ticket("r", prompt)
    assert params["remote_num_tokens"] == 300
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    pair.settle()


def test_many_at_once(pair: Pair) -> None:
    prompts = {f"r{seed}": words(5 + 11 * seed, seed) for seed in range(12)}
    for name, prompt in prompts.items():
        pair.prefill.add(name, prompt, params=PREFILL)
    pair.until(lambda: len(pair.prefill.ended) == len(prompts))
    for name, prompt in prompts.items():
        pair.decode.add(name, prompt, tokens=3, params=pair.prefill.params[name])
    pair.until(lambda: len(pair.decode.ended) == len(prompts))
    for name, prompt in prompts.items():
        assert pair.decode.tokens[name] == reference(prompt, 3), name
    pair.settle()


def test_one_engine_that_is_both_sides(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_both"), engine("kv_both"))
    prompt = words(70)
    params = pair.ticket("r", prompt)
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    back = Pair(pair.decode, pair.prefill)
    other = words(90, 3)
    params = back.ticket("s", other)
    assert back.decode_all("s", other, params) == reference(other, 3)
    pair.settle()


def test_only_whole_prefills_are_leased(pair: Pair) -> None:
    """What ends otherwise, or is not for somebody else, frees its blocks at once."""
    pair.prefill.add("plain", words(50))
    pair.until(lambda: "plain" in pair.prefill.ended)
    pair.prefill.add("aborted", words(50), params=PREFILL, tokens=9)
    pair.until(lambda: bool(pair.prefill.tokens.get("aborted")))
    pair.prefill.abort("aborted")
    assert pair.prefill.params["plain"] is None
    pair.settle(seconds=2)


def test_a_prefill_that_stops_early_is_leased(pair: Pair) -> None:
    """FINISHED_STOPPED: the model's first token happened to be a stop token."""
    prompt = words(60)
    request = pair.prefill.add("r", prompt, params=PREFILL, tokens=4)
    request.sampling_params.stop_token_ids = reference(prompt, 1)
    request.sampling_params._all_stop_token_ids = set(reference(prompt, 1))
    pair.until(lambda: "r" in pair.prefill.ended)
    assert pair.prefill.ended["r"] is RequestStatus.FINISHED_STOPPED
    params = pair.prefill.params["r"]
    assert params is not None
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    pair.settle()
