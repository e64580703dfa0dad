"""A request is aborted at every stage, on both sides: everything comes free, nothing is reported twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pd_connector.testing.faults import Rule, Status, read_events, write_script

from .engine import reference
from .pair import PREFILL, Pair, faulty, happened, words

AFTER = words(77, 5)


def serves_on(pair: Pair) -> None:
    """Both sides still hand over, and nothing is held afterwards."""
    before = len(pair.decode.transfers)
    assert pair.decode_all("after", AFTER, pair.ticket("after", AFTER)) == reference(AFTER, 3)
    assert [t["outcome"] for t in pair.decode.transfers[before:]].count("done") == 1
    pair.settle()


@pytest.mark.parametrize(
    ("on", "at"),
    [
        ("connect", "before"),
        ("connect", "after"),
        ("post_read", "before"),
        ("post_read", "middle"),
        ("post_read", "after"),
    ],
)
def test_decode_aborted_while_it_reads(engine: Callable[..., Any], tmp_path: Path, on: str, at: str) -> None:
    script = tmp_path / "script"
    write_script(script, Rule(action="hold", on=on, at=at, nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=pair.ticket("r", prompt))
    pair.until(lambda: happened(script, "held"))
    free = pair.decode.free_blocks
    pair.decode.abort("r")
    assert pair.decode.free_blocks == free, "the destination is not free before the read is quiet"
    pair.until(lambda: not pair.decode.scheduler.has_requests(), seconds=5)
    write_script(script)
    pair.settle(seconds=5)
    assert all(not output.invalid_block_ids for output in pair.decode.outputs)
    serves_on(pair)


@pytest.mark.parametrize("abandoned", [False, True])
def test_a_read_that_closing_ends_is_reported_unless_its_device_may_still_write(
    engine: Callable[..., Any], tmp_path: Path, abandoned: bool
) -> None:
    script = tmp_path / "script"
    write_script(script, Rule(action="hold", at="middle", nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script) | {"drain_seconds": 0.1}))
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=pair.ticket("r", prompt))
    pair.until(lambda: happened(script, "held"))
    worker = pair.decode.worker.worker
    for transport in worker._agent._courier._transports.values():
        transport.inner.abandoned = abandoned
    pair.decode.shutdown()
    assert len(worker._ended) == (0 if abandoned else 1)


def test_the_prefill_side_is_freed_without_waiting_for_its_lease(engine: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "script"
    write_script(script, Rule(action="hold", at="middle", nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=pair.ticket("r", prompt))
    pair.until(lambda: happened(script, "held"))
    pair.decode.abort("r")
    aborted = time.monotonic()
    pair.settle()
    assert time.monotonic() - aborted < 2


def test_decode_aborted_while_its_connection_is_being_made(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Nobody was asked for a read yet; the owner must hear of it all the same."""
    script = tmp_path / "script"
    write_script(script, Rule(action="hold", on="connect", nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=pair.ticket("r", prompt))
    pair.until(lambda: happened(script, "held"))
    pair.decode.abort("r")
    aborted = time.monotonic()
    pair.settle()
    assert time.monotonic() - aborted < 2


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_decode_aborted_after_so_many_steps(engine: Callable[..., Any], steps: int) -> None:
    """0: never scheduled; 1: the load was ordered; further on it may be read, reported, promoted or decoding."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer"))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.prefill.step()
    pair.decode.add("r", prompt, tokens=30, params=params)
    for _ in range(steps):
        pair.decode.step()
        time.sleep(0.02)
    pair.decode.abort("r")
    aborted = time.monotonic()
    pair.settle()
    assert time.monotonic() - aborted < 2
    serves_on(pair)


def test_decode_aborted_between_load_order_and_step(engine: Callable[..., Any]) -> None:
    """The load and its abort reach the worker in one and the same step."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer"))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.prefill.step()
    scheduler = pair.decode.scheduler
    pair.decode.add("r", prompt, tokens=3, params=params)
    orders = scheduler.connector.build_connector_meta
    scheduler.connector.build_connector_meta = lambda plan: (pair.decode.abort("r"), orders(plan))[1]
    pair.decode.step()
    del scheduler.connector.build_connector_meta
    pair.settle(seconds=5)
    serves_on(pair)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_decode_aborted_when_its_load_has_failed(engine: Callable[..., Any], tmp_path: Path, policy: str) -> None:
    """The worker has failed blocks to report, but the request is gone and its blocks may be another's."""
    script = tmp_path / "script"
    write_script(script, Rule(action="fail", nth=1, status=Status.ERROR))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script), policy=policy))
    prompt = words(100)
    pair.decode.add("r", prompt, tokens=3, params=pair.ticket("r", prompt))
    worker = pair.decode.worker.worker
    pair.prefill.step()
    pair.decode.step()
    deadline = time.monotonic() + 5
    while not worker._ended:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    pair.decode.abort("r")
    pair.settle(seconds=5)
    write_script(script)
    serves_on(pair)


def test_prefill_aborted_in_the_queue_and_midway(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer", budget=64, max_num_seqs=8), engine("kv_consumer"))
    for steps in range(4):
        name = f"r{steps}"
        pair.prefill.add(name, words(300, steps), params=PREFILL)
        for _ in range(steps):
            pair.prefill.step()
        pair.prefill.abort(name)
        assert pair.prefill.params.get(name) is None
        pair.settle(seconds=2)
    serves_on(pair)


def test_prefill_aborted_after_it_ended_changes_nothing(engine: Callable[..., Any]) -> None:
    pair = Pair(engine("kv_producer"), engine("kv_consumer"))
    prompt = words(100)
    params = pair.ticket("r", prompt)
    pair.prefill.abort("r")
    assert pair.decode_all("r", prompt, params) == reference(prompt, 3)
    assert pair.decode.transfers[-1]["outcome"] == "done"
    serves_on(pair)


def test_one_of_two_loads_aborted(engine: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "script"
    write_script(script, Rule(action="hold", at="middle"))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    prompts = {"a": words(100, 1), "b": words(90, 2)}
    for name, prompt in prompts.items():
        pair.decode.add(name, prompt, tokens=3, params=pair.ticket(name, prompt))
    pair.until(lambda: [entry["event"] for entry in read_events(script)].count("held") == 2)
    pair.decode.abort("a")
    write_script(script)
    pair.until(lambda: "b" in pair.decode.ended)
    assert pair.decode.tokens["b"] == reference(prompts["b"], 3)
    serves_on(pair)
