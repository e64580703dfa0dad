"""Strict: a request that was handed over is never computed here silently; without it, the same requests are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from pd_connector.errors import ConfigError
from pd_connector.protocol.params import stream_params

from .engine import reference
from .pair import Pair, words

PROMPT = words(100)
Make = Callable[..., Any]


@pytest.fixture(params=[True, False], ids=["strict", "not strict"])
def strict(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def pair(engine: Make, strict: bool) -> Pair:
    extra = {"strict": True} if strict else {}
    return Pair(engine("kv_producer"), engine("kv_consumer", extra, policy="fail" if strict else "recompute"))


def check(pair: Pair, strict: bool, params: Any, prompt: list[int] = PROMPT, **more: Any) -> None:
    tokens = pair.decode_all("r", prompt, params, **more)
    if strict:
        assert tokens == []
        assert pair.decode.ended["r"] is RequestStatus.FINISHED_ERROR
    else:
        assert tokens == reference(prompt, 3)
    # The next one is served as ever.
    other = words(60, 9)
    assert pair.decode_all("next", other, pair.ticket("next", other)) == reference(other, 3)
    pair.settle()


def test_no_ticket_at_all(pair: Pair, strict: bool) -> None:
    check(pair, strict, {"do_remote_prefill": True})


def test_a_prefill_that_nobody_computes(pair: Pair, strict: bool) -> None:
    check(pair, strict, stream_params("tcp://127.0.0.1:9", bytes(16)))


def test_a_ticket_for_other_tokens(pair: Pair, strict: bool) -> None:
    check(pair, strict, pair.ticket("r", PROMPT), [*PROMPT[:-1], 0])


def test_a_prefill_instance_that_lost_the_blocks(pair: Pair, strict: bool) -> None:
    params = pair.ticket("r", PROMPT)
    pair.until(lambda: pair.prefill.gauges["leases"] == 1)
    worker = pair.prefill.worker.worker
    worker._portal.call(worker._agent.end, params["pdc"]["lease"], "taken back")
    check(pair, strict, params)


def test_a_ticket_lost_in_the_queue(engine: Make, strict: bool) -> None:
    extra = {"strict": True} if strict else {}
    decode = engine("kv_consumer", extra, policy="fail" if strict else "recompute", max_num_seqs=1)
    pair = Pair(engine("kv_producer"), decode)
    long = words(40, 5)
    decode.add("first", long, tokens=200)
    pair.until(lambda: len(decode.tokens.get("first", [])) > 2)
    params = pair.ticket("r", PROMPT)
    decode.add("r", PROMPT, tokens=3, params=params)
    scheduler = pair.prefill.scheduler.connector.scheduler
    scheduler.side.portal.call(scheduler.side.agent.end, params["pdc"]["lease"], "taken back")
    pair.until(lambda: "r" in decode.ended, 40)
    assert decode.ended["r"] is (RequestStatus.FINISHED_ERROR if strict else RequestStatus.FINISHED_LENGTH_CAPPED)
    assert decode.counters.get("tickets_lost", 0) + decode.counters.get("transfers_failed", 0) >= 1
    pair.settle()


def test_what_strict_has_nothing_against(engine: Make) -> None:
    """Requests of its own, prefixes that it holds, and one token."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer", {"strict": True}, policy="fail"))
    assert pair.decode_all("own", PROMPT, None) == reference(PROMPT, 3)
    assert pair.decode_all("same", PROMPT, pair.ticket("same", PROMPT)) == reference(PROMPT, 3)
    assert pair.decode_all("one", [7], {"do_remote_prefill": True}) == reference([7], 3)
    pair.settle()


def test_strict_needs_the_policy(engine: Make) -> None:
    with pytest.raises(ConfigError, match='strict needs "kv_load_failure_policy": "fail"'):
        engine("kv_consumer", {"strict": True}, policy="recompute")
