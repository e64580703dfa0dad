"""Leases that end otherwise than by COMMIT: release by the router, expiry, a queue on D, a lost or stopped P."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from pd_connector.config import Config
from pd_connector.demo.instance import free_port
from pd_connector.protocol.params import from_params
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.portal import Portal
from pd_connector.testing.faults import Rule, write_script

from .engine import reference
from .pair import PREFILL, Pair, faulty, happened, words

HOLD = Rule(action="hold", at="middle", nth=1)


@pytest.fixture
def router_agent() -> Any:
    """What a router has: an agent without memory that gives tickets back."""
    portal = Portal("test-router")
    agent = Agent(Config())
    portal.call(agent.start)
    yield lambda params: portal.call(lambda: agent.release(from_params(params), whole=True))
    portal.run(agent.close(), timeout=10)
    portal.close()


def test_router_releases_a_ticket_nobody_reads(engine: Callable[..., Any], router_agent: Any) -> None:
    prefill = engine("kv_producer")
    prefill.add("r", words(100), params=PREFILL)
    prefill.finish("r")
    prefill.step()
    router_agent(prefill.params["r"])
    prefill.settle(seconds=2)


def test_release_that_overtakes_the_grant(engine: Callable[..., Any], router_agent: Any) -> None:
    """The ticket leaves with the answer of a step, the workers learn of the lease in the next one."""
    prefill = engine("kv_producer")
    prefill.add("r", words(100), params=PREFILL)
    prefill.finish("r")
    router_agent(prefill.params["r"])
    speaker = prefill.scheduler.connector.scheduler
    deadline = time.monotonic() + 5
    while not speaker._notes:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    prefill.settle(seconds=2)


def test_expiry_frees_the_blocks_and_refuses_the_reader(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer", {"lease_seconds": 0.3}), engine("kv_consumer"))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.prefill.settle(seconds=3)
    assert pair.prefill.counters["leases_expired"] == 1
    started = time.monotonic()
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    assert time.monotonic() - started < 5
    assert pair.decode.counters.get("tickets_lost", 0) + pair.decode.counters.get("transfers_failed", 0) == 1
    assert pair.decode.counters["tokens_recomputed"] == 99
    pair.settle()


def test_a_queued_request_keeps_its_lease(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer", {"lease_seconds": 1.0}), engine("kv_consumer", max_num_seqs=1))
    blocker, prompt = words(20, 9), words(100)
    params = pair.ticket("r", prompt)
    pair.decode.add("blocker", blocker, tokens=1500)
    pair.until(lambda: bool(pair.decode.tokens.get("blocker")))
    pair.decode.add("r", prompt, tokens=3, params=params)
    queued = time.monotonic()
    pair.until(lambda: time.monotonic() > queued + 2.5, seconds=5)
    pair.decode.abort("blocker")
    pair.until(lambda: "r" in pair.decode.ended)
    assert pair.decode.tokens["r"] == reference(prompt, 3)
    assert pair.decode.counters.get("tokens_recomputed", 0) == 0
    assert len(pair.decode.transfers) == 1
    pair.settle()


def test_a_ticket_lost_in_the_queue_is_not_tried(engine: Callable[..., Any], router_agent: Any) -> None:
    pair = Pair(engine("kv_producer", {"lease_seconds": 3.0}), engine("kv_consumer", max_num_seqs=1))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.prefill.step()
    pair.decode.add("blocker", words(20, 9), tokens=1500)
    pair.until(lambda: bool(pair.decode.tokens.get("blocker")))
    pair.decode.add("r", prompt, tokens=3, params=params)
    router_agent(params)
    pair.prefill.settle(seconds=3)
    lost = pair.decode.scheduler.connector.scheduler.decode._lost
    pair.until(lambda: bool(lost), seconds=15)
    pair.decode.abort("blocker")
    pair.until(lambda: "r" in pair.decode.ended)
    assert pair.decode.tokens["r"] == reference(prompt, 3)
    assert pair.decode.counters["tickets_lost"] == 1
    assert pair.decode.transfers == []
    pair.settle()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_lease_that_ends_while_it_is_read(engine: Callable[..., Any], tmp_path: Path, policy: str) -> None:
    """P takes the blocks back and writes over them while D still reads: nothing of that may be used."""
    script = tmp_path / "script"
    write_script(script, HOLD)
    pair = Pair(engine("kv_producer", blocks=16), engine("kv_consumer", faulty(script), policy=policy))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.decode.add("r", prompt, tokens=3, params=params)
    pair.until(lambda: happened(script, "held"))
    number = params["pdc"]["lease"]
    worker = pair.prefill.worker.worker
    worker._portal.call(worker._agent.end, number, "taken back by the test")
    pair.until(lambda: not pair.prefill.scheduler.has_requests())
    for seed in range(1, 4):
        pair.prefill.add(f"other{seed}", words(200, seed))
        pair.until(lambda name=f"other{seed}": name in pair.prefill.ended)
    write_script(script)
    pair.until(lambda: "r" in pair.decode.ended)
    if policy == "recompute":
        assert pair.decode.tokens["r"] == reference(prompt, 3)
        assert pair.decode.counters["tokens_recomputed"] == 99
    else:
        assert pair.decode.ended["r"] is RequestStatus.FINISHED_ERROR
        assert not pair.decode.tokens.get("r")
    assert pair.decode.transfers[-1]["outcome"] == "failed"
    again = words(60, 8)
    assert pair.decode_all("again", again, pair.ticket("again", again)) == reference(again, 3)
    assert pair.decode.transfers[-1]["outcome"] == "done"
    pair.settle()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_prefill_side_that_closes_while_it_is_read(engine: Callable[..., Any], tmp_path: Path, policy: str) -> None:
    script = tmp_path / "script"
    write_script(script, HOLD)
    prefill, decode = engine("kv_producer"), engine("kv_consumer", faulty(script), policy=policy)
    pair = Pair(prefill, decode)
    prompt = words(100)
    params = pair.ticket("r", prompt)
    decode.add("r", prompt, tokens=3, params=params)
    pair.until(lambda: happened(script, "held"))
    prefill.shutdown()
    decode.finish("r", seconds=5)
    if policy == "recompute":
        assert decode.tokens["r"] == reference(prompt, 3)
    else:
        assert decode.ended["r"] is RequestStatus.FINISHED_ERROR
    assert decode.transfers[-1]["error"] == "PeerLost"
    decode.add("next", words(50, 2), tokens=3)
    assert decode.finish("next") == reference(words(50, 2), 3)
    decode.settle()


def test_a_prefill_side_restarted_at_the_same_address(engine: Callable[..., Any]) -> None:
    port = free_port()
    first, decode = engine("kv_producer", {"port": port}), engine("kv_consumer")
    pair, old = Pair(first, decode), words(100)
    warm = words(40, 4)
    assert pair.decode_all("warm", warm, pair.ticket("warm", warm)) == reference(warm, 3)
    stale = pair.ticket("old", old)
    first.shutdown()
    pair = Pair(engine("kv_producer", {"port": port}), decode)
    new = words(80, 2)
    assert pair.decode_all("new", new, pair.ticket("new", new)) == reference(new, 3)
    assert decode.transfers[-1]["outcome"] == "done"
    started = time.monotonic()
    assert pair.decode_all("old", old, stale) == reference(old, 3)
    assert time.monotonic() - started < 3
    newer = words(90, 3)
    assert pair.decode_all("newer", newer, pair.ticket("newer", newer)) == reference(newer, 3)
    assert decode.transfers[-1]["outcome"] == "done"
    pair.settle()
