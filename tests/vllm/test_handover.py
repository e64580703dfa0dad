"""Prompts from a real prefill to a real decode instance, while everybody is well."""

from __future__ import annotations

import threading
import urllib.error
from collections.abc import Mapping
from typing import Any

import pytest
from serving import BLOCK, BLOCK_BYTES, LAYERS, Cluster, Gauge, ask, body, prefill, prompt_of, same

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def moved(prompt_tokens: int) -> int:
    return -(-prompt_tokens // BLOCK) * BLOCK_BYTES * LAYERS


def test_a_decode_instance_whose_first_forward_is_a_decode(cluster: Cluster) -> None:
    """Without the permission for AMX tiles such a worker dies with SIGILL: D must not have computed anything yet."""
    assert cluster.d.metrics().get("vllm:prompt_tokens_total", 0) == 0
    prompt = prompt_of(200)
    got = ask(cluster.d, prompt, 8, prefill(cluster.p, prompt))
    same(got, cluster.plain(prompt, 8))


@pytest.mark.parametrize("length", [31, 128, 129, 1000, 2500])
def test_lengths(cluster: Cluster, length: int) -> None:
    prompt = prompt_of(length)
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    got = ask(cluster.d, prompt, 6, prefill(cluster.p, prompt))
    same(got, cluster.plain(prompt, 6))
    assert d.since("pdc_bytes_transferred_sum") == moved(length)
    assert d.since("pdc_audit_digests_compared_total") == -(-length // BLOCK) * LAYERS
    assert d.event("tokens_recomputed") == 0
    cluster.check_free()
    assert p.event("leases_expired") == 0


def test_a_prompt_of_one_token(cluster: Cluster) -> None:
    prompt = prompt_of(1)
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    same(ask(cluster.d, prompt, 6, prefill(cluster.p, prompt)), cluster.plain(prompt, 6))
    cluster.check_free()
    assert d.event("transfers") == 0
    assert p.event("leases_expired") == 0, "D gave the ticket back"


def test_a_prefix_that_is_cached_is_not_moved_again(cluster: Cluster) -> None:
    first = prompt_of(5 * BLOCK, seed=1)
    second = [*first, *prompt_of(70, seed=2)]
    ask(cluster.d, first, 2, prefill(cluster.p, first))
    d = Gauge(cluster.d)
    got = ask(cluster.d, second, 6, prefill(cluster.p, second))
    same(got, cluster.plain(second, 6))
    assert d.since("pdc_bytes_transferred_sum") == moved(70)
    assert d.event("tokens_recomputed") == 0


def test_a_salt_on_both_sides_is_loaded(cluster: Cluster) -> None:
    prompt = prompt_of(300, seed=3)
    d = Gauge(cluster.d)
    got = ask(cluster.d, prompt, 4, prefill(cluster.p, prompt, cache_salt="tenant"), cache_salt="tenant")
    same(got, cluster.plain(prompt, 4))
    assert d.event("transfers_done") == 1


@pytest.mark.parametrize(
    ("salts", "other"),
    [(("a", "b"), False), (("a", None), False), ((None, None), True)],
    ids=["salts", "salt on one side", "tokens"],
)
def test_another_key_is_computed_not_loaded(
    cluster: Cluster, salts: tuple[str | None, str | None], other: bool
) -> None:
    prompt = prompt_of(300, seed=4)
    asked = [*prompt[:150], *prompt_of(150, seed=5)] if other else prompt
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    first, second = ({"cache_salt": salt} if salt else {} for salt in salts)
    got = ask(cluster.d, asked, 6, prefill(cluster.p, prompt, **first), **second)
    same(got, cluster.plain(asked, 6))
    d.wait(5, key_mismatches=1, transfers=0)
    cluster.check_free()
    assert p.event("leases_expired") == 0, "D gave the ticket back"


def test_many_at_once_through_too_small_a_cache(cluster: Cluster) -> None:
    """Eight requests whose last tokens need more blocks than D has: some are preempted, all are right."""
    prompts = [prompt_of(3 * BLOCK + 120, seed) for seed in range(10, 18)]
    tickets = [prefill(cluster.p, prompt) for prompt in prompts[:7]]
    d = Gauge(cluster.d)
    answers: dict[int, Any] = {}

    def decode(index: int, ticket: Mapping[str, Any]) -> None:
        answers[index] = ask(cluster.d, prompts[index], 24, ticket)

    threads = [threading.Thread(target=decode, args=pair) for pair in enumerate(tickets)]
    for thread in threads:
        thread.start()
    tickets.append(prefill(cluster.p, prompts[7]))
    decode(7, tickets[7])
    for thread in threads:
        thread.join(120)
    for index, prompt in enumerate(prompts):
        same(answers[index], cluster.plain(prompt, 24))
    assert d.since("num_preemptions_total") > 0
    assert d.event("transfers_done") == 8
    assert d.event("tokens_recomputed") == 0


def test_batches_and_choices_through_the_router(cluster: Cluster) -> None:
    first, second = prompt_of(200, seed=20), prompt_of(300, seed=21)
    d = Gauge(cluster.d)
    got = cluster.router.post("/v1/completions", body(first, 4) | {"prompt": [first, second]})
    plain = [cluster.f.post("/v1/completions", body(prompt, 4))["choices"][0]["text"] for prompt in (first, second)]
    assert [choice["text"] for choice in sorted(got["choices"], key=lambda c: c["index"])] == plain
    assert d.event("transfers_done") == 2
    several = cluster.router.post("/v1/completions", body(prompt_of(150, seed=22), 4, n=3) | {"temperature": 0.7})
    assert sorted(choice["index"] for choice in several["choices"]) == [0, 1, 2]
    cluster.check_free()


def test_a_wrong_role_computes_alone(cluster: Cluster) -> None:
    prompt = prompt_of(200, seed=23)
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    got = cluster.d.post("/v1/completions", body(prompt, 1, {"do_remote_decode": True}))
    assert got["kv_transfer_params"] is None
    d.wait(5, wrong_role=1)
    ticket = prefill(cluster.p, prompt)
    same(ask(cluster.p, prompt, 4, ticket), cluster.plain(prompt, 4))
    p.wait(5, wrong_role=1)


def test_malformed_parameters_are_no_error_of_the_server(cluster: Cluster) -> None:
    prompt = prompt_of(200, seed=24)
    plain = cluster.plain(prompt, 4)
    d = Gauge(cluster.d)
    for wrong in (
        {},
        {"remote_host": "127.0.0.1", "remote_port": 1},
        {"pdc": "?", "remote_host": 5, "remote_port": []},
    ):
        same(ask(cluster.d, prompt, 4, {"do_remote_prefill": True, **wrong}), plain)
    d.wait(5, tickets_malformed=3)
    with pytest.raises(urllib.error.HTTPError):
        cluster.d.post("/v1/completions", body(prompt, 4) | {"kv_transfer_params": "text"})
