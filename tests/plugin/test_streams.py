"""Prefills whose decode instance reads along: both engines work at once, the prompt in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from pd_connector.config import Config
from pd_connector.protocol.params import from_params, stream_params, transfer_params
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.portal import Portal

from .engine import BLOCK, LAYERS, MiniEngine, reference
from .pair import PREFILL, Pair, words

CHUNK = 4 * BLOCK
PROMPT = 20 * BLOCK + 5
BLOCK_BYTES = BLOCK * 16 * LAYERS


class Streamed(Pair):
    """``begin`` sends a request to both at once."""

    def begin(self, name: str, prompt: list[int], tokens: int = 3, first: str = "both") -> bytes:
        transfer = secrets.token_bytes(16)
        if first != "decode":
            self.to_prefill(name, prompt, transfer)
        self.decode.add(name, prompt, tokens=tokens, params=stream_params(self.address, transfer))
        return transfer

    def to_prefill(self, name: str, prompt: list[int], transfer: bytes) -> None:
        self.prefill.add(name, prompt, params=PREFILL | transfer_params(transfer, stream=True))

    @property
    def address(self) -> str:
        return str(self.prefill.scheduler.connector.scheduler.side.agent.address)

    def answered(self, name: str, prompt: list[int], tokens: int = 3) -> None:
        self.until(lambda: name in self.decode.ended and name in self.prefill.ended)
        assert self.decode.tokens[name] == reference(prompt, tokens)

    def confirm(self, name: str, chunks: int) -> None:
        """P computes so many chunks and no more; D has read them."""
        request = self.prefill.scheduler.requests[name]
        while request.num_computed_tokens < chunks * CHUNK:
            self.prefill.step()
        self.decode.until(lambda: usable(self.decode) >= chunks * CHUNK)


@pytest.fixture
def pair(engine: Callable[..., Any]) -> Streamed:
    return Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer", {"audit": True}))


def usable(engine: MiniEngine) -> int:
    """Tokens that were confirmed to this engine's worker while its only pull runs."""
    pulls = list(engine.worker.worker._agent._pulls._pulls.values())
    return max((pull.following.usable[0] for pull in pulls if pull.following is not None), default=0)


def test_a_prompt_in_chunks_is_read_while_it_is_computed(pair: Streamed) -> None:
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.confirm("r", 2)
    assert "r" not in pair.prefill.ended, "P is still computing"
    pair.answered("r", prompt)
    (moved,) = pair.decode.transfers
    assert moved["outcome"] == "done"
    assert moved["bytes"] == 21 * BLOCK_BYTES
    assert moved["compared"] == 21 * LAYERS
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK, CHUNK + 1, 700])
def test_every_length(pair: Streamed, length: int) -> None:
    prompt = words(length, length)
    pair.begin("r", prompt)
    pair.answered("r", prompt)
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_several_at_once(pair: Streamed) -> None:
    prompts = {f"r{n}": words(100 + 40 * n, n) for n in range(5)}
    for name, prompt in prompts.items():
        pair.begin(name, prompt)
    for name, prompt in prompts.items():
        pair.answered(name, prompt)
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_decode_asks_before_prefill_has_the_request(pair: Streamed) -> None:
    prompt = words(PROMPT)
    transfer = pair.begin("r", prompt, first="decode")
    for _ in range(30):
        pair.decode.step()
    assert pair.decode.free_blocks == pair.decode.cache_config.num_blocks - 1, "it pins nothing while it waits"
    pair.to_prefill("r", prompt, transfer)
    pair.answered("r", prompt)
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_what_prefill_has_cached_is_ready_at_once(pair: Streamed) -> None:
    first, second = words(PROMPT), [*words(PROMPT), *words(200, 3)]
    pair.begin("a", first, tokens=1)
    pair.answered("a", first, 1)
    pair.decode.scheduler.reset_prefix_cache()
    pair.begin("b", second)
    pair.prefill.step()
    pair.decode.until(lambda: usable(pair.decode) >= 20 * BLOCK)
    pair.answered("b", second)
    pair.settle()


def test_what_decode_has_cached_is_not_read(pair: Streamed) -> None:
    first, second = words(PROMPT), [*words(PROMPT), *words(90, 3)]
    pair.begin("a", first, tokens=1)
    pair.answered("a", first, 1)
    pair.begin("b", second)
    pair.answered("b", second)
    whole = -(-len(second) // BLOCK)
    assert pair.decode.transfers[-1]["bytes"] == (whole - 20) * BLOCK_BYTES
    pair.settle()


def test_a_prompt_that_decode_has_whole_waits_for_nobody(pair: Streamed) -> None:
    prompt = words(8 * BLOCK + 1)
    pair.begin("a", prompt)
    pair.answered("a", prompt)
    pair.settle()
    transfer = pair.begin("b", prompt, first="decode")
    assert pair.decode.finish("b", 5) == reference(prompt, 3)
    assert pair.decode.counters["tickets_not_needed"] == 1
    pair.to_prefill("b", prompt, transfer)
    pair.prefill.finish("b")
    pair.settle(seconds=4)


def test_a_wrong_role_waits_for_nobody(engine: Callable[..., Any]) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_producer"))
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.answered("r", prompt)
    assert pair.decode.counters["wrong_role"] == 1
    pair.settle(seconds=4)


def test_other_tokens_are_computed_not_loaded(pair: Streamed) -> None:
    prompt, other = words(PROMPT), words(PROMPT, 9)
    transfer = secrets.token_bytes(16)
    pair.to_prefill("r", prompt, transfer)
    pair.decode.add("r", other, tokens=3, params=stream_params(pair.address, transfer))
    pair.answered("r", other)
    assert pair.decode.counters["key_mismatches"] == 1
    pair.settle()


def test_nobody_answers_there(pair: Streamed) -> None:
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=stream_params("tcp://127.0.0.1:9", bytes(16)))
    assert pair.decode.finish("r") == reference(prompt, 3)
    assert pair.decode.counters["streams_without_lease"] == 1
    pair.decode.settle()


def test_a_prefill_that_never_comes(engine: Callable[..., Any]) -> None:
    pair = Streamed(engine("kv_producer"), engine("kv_consumer", {"prefill_wait_seconds": 0.5}))
    prompt = words(100)
    pair.begin("r", prompt, first="decode")
    assert pair.decode.finish("r") == reference(prompt, 3)
    pair.decode.step()
    assert pair.decode.counters["streams_without_lease"] == 1
    pair.decode.settle()


def preempt(engine: MiniEngine, name: str) -> None:
    """As vLLM does when blocks run out: the request goes back into the queue, its blocks are anybody's."""
    scheduler = engine.scheduler
    request = scheduler.requests[name]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    scheduler.prev_step_scheduled_req_ids.discard(name)
    scheduler.reset_prefix_cache()


def test_a_cache_hit_on_blocks_that_nobody_has_written_yet(engine: Callable[..., Any]) -> None:
    """vLLM caches blocks when it schedules them: two requests of one step share a prefix that is not computed."""
    pair = Streamed(engine("kv_producer", budget=2048), engine("kv_consumer", {"audit": True}))
    prompt = words(PROMPT)
    longer = [*prompt, *words(40, 3)]
    pair.prefill.add("a", prompt)
    pair.begin("b", longer)
    forward, before = pair.prefill._forward, []

    def late(name: str, count: int) -> list[int]:
        for _ in range(0 if before else 60):
            pair.decode.step()
            time.sleep(0.002)
        before.append(usable(pair.decode))
        return forward(name, count)

    pair.prefill._forward = late  # type: ignore[method-assign]
    pair.prefill.step()
    assert before[0] == 0, "nothing may be used before it was written"
    pair.answered("b", longer)
    pair.settle()


def test_preempted_and_then_aborted_in_the_queue(engine: Callable[..., Any]) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer"))
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.confirm("r", 2)
    preempt(pair.prefill, "r")
    scheduler = pair.prefill.scheduler
    scheduler.waiting.remove_request(scheduler.requests["r"])
    pair.prefill.add("squatter", words(30 * BLOCK, 7))
    scheduler.waiting.add_request(scheduler.requests["r"])
    pair.prefill.step()
    pair.prefill.abort("r")
    pair.until(lambda: "r" in pair.decode.ended and "squatter" in pair.prefill.ended, 8)
    assert pair.decode.tokens["r"] == reference(prompt, 3)
    pair.settle(seconds=5)
    assert not pair.prefill.worker.worker._leases


def test_given_up_by_decode_then_preempted(pair: Streamed) -> None:
    pair.begin("r", words(PROMPT))
    pair.confirm("r", 2)
    pair.decode.abort("r")
    speaker = pair.prefill.scheduler.connector.scheduler.side.agent
    pair.decode.until(lambda: not speaker.gauges()["leases"])
    pair.prefill.step()
    preempt(pair.prefill, "r")
    pair.prefill.finish("r")
    assert pair.prefill.params["r"] is None, "nobody would read under it"
    pair.settle(seconds=5)
    assert not pair.prefill.worker.worker._leases


def test_two_requests_of_decode_with_one_capability(pair: Streamed) -> None:
    prompt = words(PROMPT)
    transfer = pair.begin("r", prompt)
    pair.decode.add("s", prompt, tokens=3, params=stream_params(pair.address, transfer))
    pair.until(lambda: {"r", "s"} <= set(pair.decode.ended))
    assert pair.decode.tokens["r"] == pair.decode.tokens["s"] == reference(prompt, 3)
    pair.settle()


def test_decode_does_not_wait_long_enough(engine: Callable[..., Any]) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer", {"prefill_wait_seconds": 0.3}))
    prompt = words(PROMPT)
    transfer = pair.begin("r", prompt, first="decode")
    assert pair.decode.finish("r") == reference(prompt, 3)
    pair.to_prefill("r", prompt, transfer)
    pair.prefill.finish("r")
    pair.settle(seconds=4)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_preempted_prefill_begins_a_new_epoch(pair: Streamed, chunks: int) -> None:
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.confirm("r", chunks)
    preempt(pair.prefill, "r")
    scheduler = pair.prefill.scheduler
    scheduler.waiting.remove_request(scheduler.requests["r"])
    pair.prefill.add("squatter", words(30 * BLOCK, 7))
    scheduler.waiting.add_request(scheduler.requests["r"])
    pair.answered("r", prompt)
    assert "squatter" in pair.prefill.ended
    moved = [t for t in pair.decode.transfers if t["outcome"] == "done"]
    assert len(moved) == 1
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


def test_preempted_while_decode_waits_in_its_queue(engine: Callable[..., Any]) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer", blocks=26))
    long, prompt = words(PROMPT, 5), words(PROMPT)
    pair.decode.add("long", long, tokens=40)
    pair.decode.step()
    pair.begin("r", prompt)
    speaker = pair.decode.scheduler.connector.scheduler
    pair.until(lambda: speaker.decode._hopes["r"].ticket is not None)
    preempt(pair.prefill, "r")
    pair.answered("r", prompt)
    assert pair.decode.tokens["long"] == reference(long, 40)
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 5])
def test_an_aborted_prefill_leaves_what_was_confirmed(engine: Callable[..., Any], policy: str, chunks: int) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer", {"audit": True}, policy=policy))
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.confirm("r", chunks)
    pair.prefill.abort("r")
    squatter = words(30 * BLOCK, 7)
    pair.prefill.add("squatter", squatter)
    pair.until(lambda: "r" in pair.decode.ended and "squatter" in pair.prefill.ended)
    if policy == "fail" and pair.decode.transfers:
        assert pair.decode.ended["r"] is RequestStatus.FINISHED_ERROR
    else:
        assert pair.decode.tokens["r"] == reference(prompt, 3)
        pair.decode.step()
        unconfirmed = PROMPT - chunks * CHUNK
        assert pair.decode.counters.get("tokens_recomputed", 0) <= unconfirmed + BLOCK
    pair.settle()


def test_decode_aborts_midway(pair: Streamed) -> None:
    pair.begin("r", words(PROMPT))
    pair.confirm("r", 1)
    pair.decode.abort("r")
    pair.until(lambda: "r" in pair.prefill.ended)
    pair.settle(seconds=5)


def test_decode_aborts_while_it_waits(pair: Streamed) -> None:
    prompt = words(PROMPT)
    transfer = pair.begin("r", prompt, first="decode")
    for _ in range(5):
        pair.decode.step()
    pair.decode.abort("r")
    pair.to_prefill("r", prompt, transfer)
    pair.until(lambda: "r" in pair.prefill.ended)
    pair.settle(seconds=5)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["before", "midway", "after"])
def test_the_router_gives_up(engine: Callable[..., Any], stream: bool, when: str) -> None:
    """By the capability that it chose, whatever P has done by then: its answer may never arrive."""
    prefill = engine("kv_producer", budget=CHUNK)
    transfer, portal, agent = secrets.token_bytes(16), Portal("test-router"), Agent(Config())
    portal.call(agent.start)
    address = prefill.scheduler.connector.scheduler.side.agent.address

    def renounce() -> None:
        portal.call(lambda: agent.disclaim(address, transfer, renounce=True))
        prefill.until(lambda: speaker.counters()["leases_renounced"] == 1)

    speaker = prefill.scheduler.connector.scheduler.side.agent
    try:
        if when == "before":
            renounce()
        prefill.add("r", words(PROMPT), params=PREFILL | transfer_params(transfer, stream=stream))
        prefill.step()
        if when == "midway":
            renounce()
        prefill.finish("r")
        if when == "after":
            prefill.step()
            renounce()
        prefill.settle(seconds=4)
    finally:
        portal.run(agent.close(), timeout=10)
        portal.close()


def test_the_ticket_of_a_stream_serves_afterwards(pair: Streamed) -> None:
    """The router tries again, one leg after the other, when the decode instance that read along is lost."""
    prompt, transfer = words(PROMPT), secrets.token_bytes(16)
    pair.to_prefill("r", prompt, transfer)
    pair.prefill.finish("r")
    params = pair.prefill.params["r"]
    assert params is not None
    assert from_params(params).capability == transfer
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    pair.settle()
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0
