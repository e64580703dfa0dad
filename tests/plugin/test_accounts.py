"""What engines tell of the time that a hand-over took: to whoever asked, and to their own metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pd_connector.protocol.messages import DecodeTimes, PrefillTimes
from pd_connector.protocol.params import stream_params, transfer_params, with_report
from pd_connector.runtime.clock import clock_id, stamp
from pd_connector.vllm_plugin import metrics

from .engine import BLOCK, reference
from .listener import Listener
from .pair import PREFILL, Pair, words

OF = bytes(range(16))


@pytest.fixture
def pair(engine: Callable[..., Any]) -> Pair:
    return Pair(engine("kv_producer", budget=BLOCK), engine("kv_consumer"))


def stages(engine: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for stats in engine.stats:
        for stage, seconds in stats.get("stages", ()):
            found.setdefault(stage, []).append(seconds)
    return found


def test_both_sides_of_a_hand_over_tell(pair: Pair, listener: Listener) -> None:
    prompt, before = words(3 * BLOCK), stamp()
    pair.prefill.add("r", prompt, params=with_report(PREFILL, listener.address, OF))
    pair.until(lambda: "r" in pair.prefill.ended)
    ticket = with_report(pair.prefill.params["r"] or {}, listener.address, OF)
    assert pair.decode_all("r", prompt, ticket) == reference(prompt, 3)
    pair.until(lambda: len(listener.told) == 2)
    assert all((account.of, account.clock) == (OF, clock_id()) for account in listener.told)
    p, d = listener.times(PrefillTimes), listener.times(DecodeTimes)
    assert before < p.arrived < p.scheduled < p.computed
    assert p.computed < d.arrived < d.ordered < d.read <= d.confirmed < d.scheduled < stamp()
    assert d.announced == 0, "the ticket was the announcement"
    assert 0 < d.reading <= d.read - d.ordered
    assert (d.prompt, d.cached, d.expected, d.loaded) == (3 * BLOCK, 0, 3 * BLOCK, 3 * BLOCK)
    pair.settle()
    assert [len(stages(engine)[name]) for engine, name in ((pair.prefill, "prefill"), (pair.decode, "d_queue"))] == [
        1,
        1,
    ]
    assert stages(pair.prefill)["prefill"][0] == pytest.approx((p.computed - p.scheduled) / 1e9)
    assert stages(pair.decode)["d_queue"] == [pytest.approx((d.ordered - d.arrived + d.scheduled - d.confirmed) / 1e9)]


def test_of_what_is_here_already_nothing_is_expected(pair: Pair, listener: Listener) -> None:
    first = words(2 * BLOCK)
    pair.decode_all("a", first, pair.ticket("a", first))
    second = [*first, *words(BLOCK, seed=1)]
    pair.decode_all("b", second, with_report(pair.ticket("b", second), listener.address, OF))
    pair.until(lambda: bool(listener.told))
    d = listener.times(DecodeTimes)
    assert (d.prompt, d.cached, d.expected, d.loaded) == (3 * BLOCK, 2 * BLOCK, BLOCK, BLOCK)
    pair.settle()


def test_reading_along_the_last_part_counts(pair: Pair, listener: Listener) -> None:
    prompt = words(5 * BLOCK)
    transfer = bytes(15) + b"t"
    address = pair.prefill.scheduler.connector.scheduler.side.agent.address
    pair.prefill.add("r", prompt, params=with_report(PREFILL | transfer_params(transfer, True), listener.address, OF))
    pair.decode.add("r", prompt, tokens=3, params=with_report(stream_params(address, transfer), listener.address, OF))
    pair.until(lambda: "r" in pair.decode.ended)
    pair.until(lambda: len(listener.told) == 2)
    p, d = listener.times(PrefillTimes), listener.times(DecodeTimes)
    assert p.computed < d.announced < d.read <= d.confirmed
    assert d.ordered < p.computed, "it read along"
    assert (d.expected, d.loaded) == (5 * BLOCK, 5 * BLOCK)
    pair.settle()


def test_a_load_that_fails_is_not_called_loaded(pair: Pair, listener: Listener) -> None:
    prompt = words(2 * BLOCK)
    ticket = pair.ticket("r", prompt)
    pair.prefill.scheduler.connector.scheduler.side.orders.ends.append((1, 1, "for this test", False))
    pair.prefill.step()
    assert pair.decode_all("r", prompt, with_report(ticket, listener.address, OF)) == reference(prompt, 3)
    pair.until(lambda: bool(listener.told))
    d = listener.times(DecodeTimes)
    assert (d.expected, d.loaded) == (2 * BLOCK, 0)
    pair.settle()


def test_aborted_requests_are_forgotten(pair: Pair, listener: Listener) -> None:
    params = with_report(PREFILL, listener.address, OF)
    for name, steps in (("never scheduled", 0), ("midway", 1)):
        pair.prefill.add(name, words(4 * BLOCK), params=params)
        for _ in range(steps):
            pair.prefill.step()
        pair.prefill.abort(name)
    pair.decode.add("d", words(9), params=with_report(pair.ticket("p", words(9)), listener.address, OF))
    pair.decode.abort("d")
    pair.settle()
    assert listener.told == []


def test_stamps_of_another_clock_are_not_taken(pair: Pair, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a large instance run on other hosts, too."""
    monkeypatch.setattr(metrics, "clock_id", lambda: "another boot")
    prompt = words(BLOCK)
    pair.prefill.add("r", prompt, params=with_report(PREFILL, listener.address, OF))
    pair.until(lambda: "r" in pair.prefill.ended)
    ticket = with_report(pair.prefill.params["r"] or {}, listener.address, OF)
    pair.decode_all("r", prompt, ticket)
    pair.until(lambda: len(listener.told) == 2)
    p, d = listener.times(PrefillTimes), listener.times(DecodeTimes)
    assert p.computed > p.scheduled, "the scheduler's own clock will do"
    assert (d.read, d.confirmed) == (0, 0)
    assert d.scheduled > d.ordered
    pair.settle()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://[::1]:9", "tcp://no.such.host.invalid:5"])
def test_nobody_listens(pair: Pair, address: str) -> None:
    prompt = words(BLOCK)
    pair.prefill.add("r", prompt, params=with_report(PREFILL, address, OF))
    pair.until(lambda: "r" in pair.prefill.ended)
    ticket = with_report(pair.prefill.params["r"] or {}, address, OF)
    assert pair.decode_all("r", prompt, ticket) == reference(prompt, 3)
    pair.settle()
