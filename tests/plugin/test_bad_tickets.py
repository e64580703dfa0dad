"""Tickets that cannot serve a request, or lie: local recompute and a counter, never a load, never a hang."""

from __future__ import annotations

import copy
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.lora.request import LoRARequest

from pd_connector.demo.instance import free_port
from pd_connector.testing.faults import Rule, write_script

from .engine import reference
from .pair import PREFILL, Pair, faulty, words

PROMPT = words(100)


@pytest.fixture
def pair(engine: Callable[..., Any]) -> Pair:
    return Pair(engine("kv_producer"), engine("kv_consumer"))


def adapter(name: str) -> LoRARequest:
    return LoRARequest(lora_name=name, lora_int_id=1, lora_path="/nowhere")


@pytest.mark.parametrize(
    ("prefill", "decode", "prompt"),
    [
        pytest.param({}, {}, [*PROMPT[:-1], 0], id="tokens"),
        pytest.param({}, {}, PROMPT[:-1], id="fewer tokens"),
        pytest.param({"cache_salt": "a"}, {"cache_salt": "b"}, PROMPT, id="salt"),
        pytest.param({"cache_salt": "a"}, {}, PROMPT, id="salt on one side"),
        pytest.param({"lora_request": adapter("a")}, {"lora_request": adapter("b")}, PROMPT, id="lora"),
        pytest.param({}, {"lora_request": adapter("b")}, PROMPT, id="lora on one side"),
    ],
)
def test_another_key_is_never_loaded(
    pair: Pair, prefill: dict[str, Any], decode: dict[str, Any], prompt: list[int]
) -> None:
    params = pair.ticket("r", PROMPT, **prefill)
    started = time.monotonic()
    assert pair.decode_all("r", prompt, params, **decode) == reference(prompt, 3)
    pair.settle(seconds=5)
    assert time.monotonic() - started < 5, "the mismatched ticket was not given back"
    assert pair.decode.transfers == []
    assert pair.decode.counters["key_mismatches"] == 1


@pytest.mark.parametrize("same", [{"cache_salt": "a"}, {"lora_request": adapter("a")}], ids=["salt", "lora"])
def test_the_same_key_is_loaded(pair: Pair, same: dict[str, Any]) -> None:
    """The control of the test above."""
    assert pair.decode_all("r", PROMPT, pair.ticket("r", PROMPT, **same), **same) == reference(PROMPT, 3)
    assert [t["outcome"] for t in pair.decode.transfers] == ["done"]
    pair.settle()


@pytest.mark.parametrize("audit", [False, True])
def test_a_ticket_with_the_key_of_another_is_never_loaded(engine: Callable[..., Any], pair: Pair, audit: bool) -> None:
    """Nor its blocks in another order. Whoever comes later must not find such bytes in the prefix cache either."""
    if audit:
        pair = Pair(engine("kv_producer", {"audit": True}), engine("kv_consumer", {"audit": True}))
    mine, other = pair.ticket("mine", PROMPT), pair.ticket("other", words(len(PROMPT), seed=5))
    other["pdc"]["key"] = mine["pdc"]["key"]
    assert pair.decode_all("r", PROMPT, other) == reference(PROMPT, 3)
    mine["remote_block_ids"][0].reverse()
    assert pair.decode_all("s", PROMPT, mine) == reference(PROMPT, 3)
    assert [transfer["outcome"] for transfer in pair.decode.transfers][:1] == ["failed"]
    assert pair.decode_all("later", PROMPT, None) == reference(PROMPT, 3)


def changed(params: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = copy.deepcopy(params)
    *parents, last = path.split(".")
    place = out
    for parent in parents:
        place = place[parent]
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return out


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pdc", None),
        ("pdc", "nonsense"),
        ("pdc.capability", None),
        ("pdc.capability", "00"),
        ("pdc.lease", -1),
        ("pdc.lease", "1"),
        ("pdc.key", "zz"),
        ("pdc.incarnation", "not hex"),
        ("remote_host", None),
        ("remote_port", 0),
        ("remote_port", 70000),
        ("remote_port", "x"),
        ("remote_port", float("inf")),
        ("remote_port", True),
        ("remote_host", "\ud800"),
        ("remote_block_ids", None),
        ("remote_block_ids", []),
        ("remote_block_ids", [[1, -2]]),
        ("remote_block_ids", 5),
        ("remote_num_tokens", None),
        ("remote_num_tokens", 2.5),
    ],
)
def test_malformed_parameters(pair: Pair, path: str, value: Any) -> None:
    params = changed(pair.ticket("r", PROMPT), path, value)
    assert pair.decode_all("r", PROMPT, params) == reference(PROMPT, 3)
    assert pair.decode.counters["tickets_malformed"] == 1
    assert pair.decode.transfers == []
    pair.decode.settle()


def test_what_routers_change_does_no_harm(pair: Pair) -> None:
    """vllm-router and others replace the request id and the engine id, and add keys of their own."""
    params = changed(pair.ticket("r", PROMPT), "remote_request_id", "another")
    params |= {"remote_engine_id": "x", "unknown": {"a": 1}, "remote_host": "localhost"}
    assert pair.decode_all("other-name", PROMPT, params) == reference(PROMPT, 3)
    assert pair.decode.transfers[-1]["outcome"] == "done"
    pair.settle()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pdc.capability", "00" * 16),
        ("pdc.lease", 77),
        ("pdc.epoch", 9),
        ("pdc.incarnation", "1"),
        ("remote_block_ids", [[50, 51, 52, 53, 54, 55, 56]]),
        ("remote_block_ids", [[9000, 9001, 9002, 9003, 9004, 9005, 9006]]),
    ],
)
def test_forged_tickets(engine: Callable[..., Any], path: str, value: Any) -> None:
    """The owner believes nothing of a ticket; D recomputes within a bounded time, P's lease is nobody's but its own."""
    pair = Pair(engine("kv_producer"), engine("kv_consumer"))
    params = pair.ticket("r", PROMPT)
    started = time.monotonic()
    assert pair.decode_all("r", PROMPT, changed(params, path, value)) == reference(PROMPT, 3)
    assert time.monotonic() - started < 10
    assert pair.decode.transfers[-1]["outcome"] == "failed"
    assert pair.decode.counters["tokens_recomputed"] == 99
    if path != "remote_block_ids":  # with the right capability the forger may also give the lease back
        assert pair.prefill.gauges["leases"] == 1
    pair.decode.scheduler.reset_prefix_cache()
    assert pair.decode_all("again", PROMPT, pair.ticket("again", PROMPT)) == reference(PROMPT, 3)
    assert pair.decode.transfers[-1]["outcome"] == "done"


def test_a_ticket_with_too_few_blocks(pair: Pair) -> None:
    params = changed(pair.ticket("r", PROMPT), "remote_block_ids", [[1, 2]])
    assert pair.decode_all("r", PROMPT, params) == reference(PROMPT, 3)
    assert [transfer["outcome"] for transfer in pair.decode.transfers] == ["failed"]
    pair.settle(seconds=5)


def test_a_ticket_with_too_many_groups(pair: Pair) -> None:
    params = pair.ticket("r", PROMPT)
    params = changed(params, "remote_block_ids", params["remote_block_ids"] * 2)
    assert pair.decode_all("r", PROMPT, params) == reference(PROMPT, 3)
    assert pair.decode.counters["tickets_unusable"] == 1
    pair.settle(seconds=5)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "never answers"])
def test_an_address_that_does_not_answer(pair: Pair, listener: int, silent: bool) -> None:
    params = changed(pair.ticket("r", PROMPT), "remote_port", listener if silent else free_port())
    started = time.monotonic()
    pair.decode.add("r", PROMPT, tokens=3, params=params)
    other = words(50, 3)
    # Meanwhile D serves others.
    assert pair.decode_all("other", other, pair.ticket("other", other)) == reference(other, 3)
    assert "r" not in pair.decode.ended
    pair.until(lambda: "r" in pair.decode.ended)
    assert time.monotonic() - started < 10
    assert pair.decode.tokens["r"] == reference(PROMPT, 3)
    assert pair.decode.transfers[-1]["error"] == "PeerLost"


def refused(pair: Pair, caplog: pytest.LogCaptureFixture) -> str:
    """A hand-over that is refused at HELLO: D's log line. P hears of it, its blocks come free."""
    logger = logging.getLogger("pd_connector")  # vLLM's handlers serve it, it does not propagate
    logger.addHandler(caplog.handler)
    try:
        started = time.monotonic()
        assert pair.decode_all("r", PROMPT, pair.ticket("r", PROMPT)) == reference(PROMPT, 3)
        pair.settle(seconds=5)
        assert time.monotonic() - started < 5
    finally:
        logger.removeHandler(caplog.handler)
    assert pair.decode.transfers[-1]["error"] == "LayoutMismatch"
    return next(r.getMessage() for r in caplog.records if "load failed" in r.getMessage())


def test_layouts_that_differ_are_refused_in_words(engine: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(engine("kv_producer"), engine("kv_consumer"))
    worker = pair.decode.worker.worker
    identity = worker._agent.core.identity
    group = msgspec.structs.replace(identity.layout.groups[0], dtype="float8_e4m3fn")
    layout = msgspec.structs.replace(identity.layout, groups=(group,))
    worker._agent.core.identity = type(identity)(
        identity.agent, identity.incarnation, identity.model, layout, identity.transports
    )
    assert "group 0 dtype: ours 'float8_e4m3fn', theirs 'bfloat16'" in refused(pair, caplog)


def test_another_model_is_refused_in_words(engine: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Keys cover the model, so D sees it before it dials; a ticket with a fitting key still meets HELLO."""
    pair = Pair(engine("kv_producer", {"model": "one"}), engine("kv_consumer", {"model": "two"}))
    assert pair.decode_all("a", PROMPT, pair.ticket("a", PROMPT)) == reference(PROMPT, 3)
    assert pair.decode.counters["key_mismatches"] == 1
    pair.decode.scheduler.connector.scheduler.side.model = "one"
    pair.decode.scheduler.reset_prefix_cache()
    line = refused(pair, caplog)
    assert "'two'" in line
    assert "'one'" in line


@pytest.mark.parametrize(("prefill", "decode"), [("kv_consumer", "kv_consumer"), ("kv_producer", "kv_producer")])
def test_a_wrong_role(engine: Callable[..., Any], prefill: str, decode: str) -> None:
    pair = Pair(engine(prefill), engine(decode))
    pair.prefill.add("r", PROMPT, params=PREFILL)
    pair.until(lambda: "r" in pair.prefill.ended)
    params = pair.prefill.params["r"]
    if prefill == "kv_consumer":
        assert params is None
        assert pair.prefill.counters["wrong_role"] == 1
    else:
        assert pair.decode_all("r", PROMPT, params) == reference(PROMPT, 3)
        assert pair.decode.counters["wrong_role"] == 1
        assert pair.decode.transfers == []
    pair.settle(seconds=5)


@pytest.mark.parametrize("flip", [True, False])
def test_a_flipped_byte_on_the_wire(engine: Callable[..., Any], tmp_path: Path, flip: bool) -> None:
    script = tmp_path / "script"
    if flip:
        write_script(script, Rule(action="corrupt", nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", {"audit": True, **faulty(script)}))
    assert pair.decode_all("r", PROMPT, pair.ticket("r", PROMPT)) == reference(PROMPT, 3)
    pair.settle()
    assert pair.prefill.counters.get("audit_mismatches", 0) == flip
    assert pair.decode.transfers[-1]["outcome"] == ("failed" if flip else "done")
    assert pair.decode.counters.get("tokens_recomputed", 0) == (99 if flip else 0)


def test_without_audit_a_flipped_byte_shows_in_the_answer(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Why the tests here may compare tokens: the model of these engines depends on every byte."""
    script = tmp_path / "script"
    write_script(script, Rule(action="corrupt", nth=1))
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    assert pair.decode_all("r", PROMPT, pair.ticket("r", PROMPT)) != reference(PROMPT, 3)
    pair.settle()


def test_a_completion_that_comes_twice(engine: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "script"
    write_script(script)
    pair = Pair(engine("kv_producer"), engine("kv_consumer", faulty(script)))
    first = words(100, 99)  # beside load a greeting is repeated, and its second answer is late too
    assert pair.decode_all("first", first, pair.ticket("first", first)) == reference(first, 3)
    pair.settle()
    agent = pair.decode.worker.worker._agent
    before = agent.counters()["late_events"]
    write_script(script, Rule(action="duplicate"))
    for seed in range(3):
        prompt = words(100, seed)
        assert pair.decode_all(f"r{seed}", prompt, pair.ticket(f"r{seed}", prompt)) == reference(prompt, 3)
    pair.settle()
    # The last may come behind everything else; beside load a question is repeated, and its second answer is late too.
    pair.until(lambda: agent.counters()["late_events"] >= before + 3)
    assert agent.counters()["transfers_done"] == 4
