"""Turns of a conversation: what D keeps of one, and the next one's prefill on an instance that has nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from msgspec.structs import replace
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats

from pd_connector import Config
from pd_connector.protocol.messages import PrefillTimes, Saved
from pd_connector.protocol.params import stream_params, to_params, transfer_params, with_prefix, with_report, with_save
from pd_connector.protocol.ticket import Ticket
from pd_connector.testing.faults import Rule, write_script
from pd_connector.vllm_plugin import metrics, turn_pool

from .engine import BLOCK, LAYERS, MiniEngine, reference
from .listener import Listener
from .pair import PREFILL, Pair, faulty, happened, words

BLOCK_BYTES = BLOCK * 16 * LAYERS
POOL = {"pool_bytes": 40 * BLOCK_BYTES}
FIRST = words(100)


def of(number: int) -> bytes:
    return bytes([number] * 16)


class Talk:
    """A decode instance with a pool, and prefill instances that forget everything between turns."""

    def __init__(self, engine: Callable[..., Any], listener: Listener, **pool: Any) -> None:
        self.decode = engine("kv_consumer", POOL | pool)
        self.listener = listener
        self._engine = engine
        self._turns = 0

    def fresh(self, extra: dict[str, Any] | None = None, **options: Any) -> Pair:
        return Pair(self._engine("kv_both", extra, **options), self.decode)

    def turn(
        self, pair: Pair, prompt: Sequence[int], prefix: Ticket | None = None, tokens: int = 5, **more: Any
    ) -> tuple[list[int], Ticket | None]:
        """One turn: D's answer, and the ticket of what it kept."""
        self._turns += 1
        name, wanted = f"turn {self._turns}", of(self._turns)
        params = with_report(PREFILL, self.listener.address, wanted)
        if prefix is not None:
            params = with_prefix(params, as_params(prefix))
        pair.prefill.add(name, prompt, params=params, **more)
        pair.until(lambda: name in pair.prefill.ended)
        ticket = with_save(with_report(pair.prefill.params[name] or {}, self.listener.address, wanted))
        answer = pair.decode_all(name, prompt, ticket, tokens=tokens, **more)
        pair.until(lambda: any(saved.of == wanted for saved in self.listener.saved))
        (saved,) = (saved for saved in self.listener.saved if saved.of == wanted)
        return answer, Ticket.from_bytes(saved.ticket) if saved.ticket else None

    def prefilled(self) -> PrefillTimes:
        """What the last prefill told."""
        return [account.times for account in self.listener.told if isinstance(account.times, PrefillTimes)][-1]

    @property
    def used(self) -> int:
        return int(self.decode.scheduler.connector.scheduler.turns.used)


def as_params(ticket: Ticket) -> dict[str, Any]:
    return to_params(ticket, request_id="", engine_id="", tp_size=1, pp_size=1)


@pytest.fixture
def talk(engine: Callable[..., Any], listener: Listener) -> Talk:
    return Talk(engine, listener)


def computed_by(engine: MiniEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that an engine computes, per call of its forward."""
    counts: list[int] = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda name, count: counts.append(count) or forward(name, count))
    return counts


def test_the_next_turn_is_read_not_computed(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    history = list(FIRST)
    ticket: Ticket | None = None
    for turn in range(4):
        pair = talk.fresh()
        computed = computed_by(pair.prefill, monkeypatch)
        prompt = [*history, *words(20, seed=turn + 1)]
        answer, kept = talk.turn(pair, prompt, ticket)
        assert answer == reference(prompt, 5)
        assert kept is not None
        assert kept.tokens == len(prompt) + 4, "the last token sampled was not computed"
        if ticket is not None:
            assert sum(computed) == len(prompt) - ticket.tokens
            assert (talk.prefilled().expected, talk.prefilled().loaded) == (ticket.tokens, ticket.tokens)
        ticket, history = kept, [*prompt, *answer]
        pair.settle()
    assert talk.decode.counters["turns_kept"] == 4


def test_bytes_that_were_kept_are_those_that_are_computed(talk: Talk) -> None:
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    assert ticket is not None
    prompt, seen = [*FIRST, *answer, 7], {}
    for name, params in (("read", with_prefix(PREFILL, as_params(ticket))), ("computed", None)):
        engine = talk.fresh().prefill
        request = engine.add(name, prompt, tokens=9, params=params)
        engine.until(lambda request=request: request.num_computed_tokens >= len(prompt))
        (blocks,) = engine.scheduler.kv_cache_manager.get_block_ids(name)
        seen[name] = engine.words[:, blocks].flatten(1, 2)[:, : ticket.tokens].clone()
        engine.abort(name)
    assert (seen["read"] == seen["computed"]).all()
    assert seen["read"].any()
    assert not (seen["read"] == seen["computed"].roll(1, 1)).all(), "the comparison can fail"


def test_device_blocks_are_free_as_soon_as_they_are_copied(talk: Talk) -> None:
    pair = talk.fresh()
    talk.turn(pair, FIRST)
    pair.settle()  # nothing leased, all of D's own blocks free, while the pool holds the turn
    assert talk.used == 7


@pytest.mark.parametrize("streamed", [False, True])
def test_reading_on_from_a_prefix_in_chunks(talk: Talk, streamed: bool) -> None:
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    pair = talk.fresh(budget=2 * BLOCK)
    prompt = [*FIRST, *answer, *words(90, seed=3)]
    if not streamed:
        assert talk.turn(pair, prompt, ticket)[0] == reference(prompt, 5)
        pair.settle()
        return
    transfer = of(99)
    address = pair.prefill.scheduler.connector.scheduler.side.agent.address
    assert ticket is not None
    pair.prefill.add("s", prompt, params=with_prefix(PREFILL | transfer_params(transfer, True), as_params(ticket)))
    assert pair.decode_all("s", prompt, stream_params(address, transfer)) == reference(prompt, 3)
    assert talk.decode.counters["parts_confirmed"] >= 2
    assert talk.decode.counters.get("tokens_recomputed", 0) == 0
    pair.settle()


def test_nothing_is_ready_before_it_is_confirmed(talk: Talk, tmp_path: Path) -> None:
    """P's load from the pool is held up: D, who reads along, must not get blocks that P does not have."""
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    assert ticket is not None
    script = tmp_path / "script"
    write_script(script, Rule(action="hold"))
    pair = talk.fresh(faulty(script))
    prompt, transfer = [*FIRST, *answer, *words(30, seed=3)], of(98)
    address = pair.prefill.scheduler.connector.scheduler.side.agent.address
    before = talk.decode.counters.get("parts_confirmed", 0)
    pair.prefill.add("s", prompt, params=with_prefix(PREFILL | transfer_params(transfer, True), as_params(ticket)))
    pair.decode.add("s", prompt, tokens=3, params=stream_params(address, transfer))
    pair.until(lambda: happened(script, "held"))
    for _ in range(50):
        pair.step()
    assert talk.decode.counters.get("parts_confirmed", 0) == before
    assert "s" not in pair.decode.ended
    write_script(script)
    pair.until(lambda: "s" in pair.decode.ended)
    assert pair.decode.tokens["s"] == reference(prompt, 3)
    pair.settle()


def test_a_turn_that_differs_keeps_what_is_before(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template, or the client, may write the answer otherwise than it was sampled."""
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    for cut in (100, 95, 48, 17):
        pair = talk.fresh()
        computed = computed_by(pair.prefill, monkeypatch)
        prompt = [*FIRST, *answer][:cut] + words(30, seed=5)
        assert ticket is not None
        pair.prefill.add("r", prompt, params=with_prefix(PREFILL, as_params(ticket)))
        pair.until(lambda pair=pair: "r" in pair.prefill.ended)
        assert pair.decode_all(f"r{cut}", prompt, pair.prefill.params["r"]) == reference(prompt, 3)
        assert sum(computed) == len(prompt) - cut // BLOCK * BLOCK
        pair.settle()
        _, ticket = talk.turn(talk.fresh(), FIRST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"capability": bytes(16)}, {"lease": 77}, {"epoch": 9}, {"incarnation": 5}, {"tokens": 90},
        {"blocks": ((9, 8, 7, 6, 5, 4, 3),)}, {"key": b"x" * 16, "marks": ()}, {"blocks": ((0,), (1,))},
        {"marks": ((16, b"x" * 16),)},
    ],
)  # fmt: skip
def test_a_ticket_that_is_wrong_costs_a_computation(talk: Talk, wrong: dict[str, Any]) -> None:
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    assert ticket is not None
    pair = talk.fresh()
    prompt = [*FIRST, *answer, *words(20, seed=3)]
    assert talk.turn(pair, prompt, replace(ticket, **wrong))[0] == reference(prompt, 5)
    assert pair.prefill.counters.get("tokens_recomputed", 0) == 0, "that is of hand-overs"
    pair.settle()


def test_another_tenant_gets_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, ticket = talk.turn(talk.fresh(), FIRST, cache_salt="mine")
    pair = talk.fresh()
    computed = computed_by(pair.prefill, monkeypatch)
    prompt = [*FIRST, *answer, 5]
    talk.turn(pair, prompt, ticket, cache_salt="yours")
    assert sum(computed) == len(prompt)
    assert pair.prefill.counters["key_mismatches"] == 1
    pair.settle()


def test_a_producer_loads_nothing(talk: Talk, engine: Callable[..., Any]) -> None:
    answer, ticket = talk.turn(talk.fresh(), FIRST)
    pair = Pair(engine("kv_producer"), talk.decode)
    prompt = [*FIRST, *answer, 5]
    assert talk.turn(pair, prompt, ticket)[0] == reference(prompt, 5)
    assert pair.prefill.counters["wrong_role"] == 1
    pair.settle()


# --- a pool has an end ------------------------------------------------------------------------------------------------


def test_the_oldest_turns_make_room(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = talk.fresh()
    kept = []
    for seed in range(8):  # seven slots each, of forty
        prompt = words(100, seed)
        kept.append((prompt, *talk.turn(pair, prompt)))
        assert talk.used <= 40
    assert talk.used == 35
    for number, (prompt, answer, ticket) in enumerate(kept):
        other = talk.fresh()
        computed = computed_by(other.prefill, monkeypatch)
        longer = [*prompt, *answer, 1, 2]
        assert ticket is not None
        other.prefill.add("r", longer, params=with_prefix(PREFILL, as_params(ticket)))
        other.until(lambda other=other: "r" in other.prefill.ended)
        assert other.decode_all(f"r{number}", longer, other.prefill.params["r"]) == reference(longer, 3)
        assert sum(computed) == (len(longer) if number < 3 else len(longer) - ticket.tokens), number
        other.settle()


def test_a_turn_larger_than_the_pool(talk: Talk) -> None:
    pair = talk.fresh()
    prompt = words(45 * BLOCK)
    answer, ticket = talk.turn(pair, prompt)
    assert answer == reference(prompt, 5)
    assert ticket is None
    assert "pool_bytes is too small" in talk.listener.saved[-1].reason
    assert talk.decode.counters["turns_not_kept"] == 1
    pair.settle()


def test_without_a_pool_nothing_is_kept(engine: Callable[..., Any], listener: Listener) -> None:
    talk = Talk(engine, listener, pool_bytes=0)
    pair = talk.fresh()
    answer, ticket = talk.turn(pair, FIRST)
    assert answer == reference(FIRST, 5)
    assert ticket is None
    assert "pool_bytes is 0" in listener.saved[-1].reason
    pair.settle()


def test_a_released_turn_leaves_the_pool(talk: Talk) -> None:
    pair = talk.fresh()
    _, ticket = talk.turn(pair, FIRST)
    assert ticket is not None
    talk.listener.call(lambda: talk.listener.agent.release(ticket, whole=True))
    pair.until(lambda: (talk.decode.step(), talk.used == 0)[1])
    pair.settle()


def test_turns_expire(engine: Callable[..., Any], listener: Listener) -> None:
    talk = Talk(engine, listener, pool_seconds=0.3)
    pair = talk.fresh()
    answer, ticket = talk.turn(pair, FIRST)
    pair.until(lambda: (talk.decode.step(), talk.used == 0)[1])
    prompt = [*FIRST, *answer, 3]
    other = talk.fresh()
    assert talk.turn(other, prompt, ticket)[0] == reference(prompt, 5)
    other.settle()


def test_an_aborted_request_is_not_kept(talk: Talk) -> None:
    pair = talk.fresh()
    ticket = with_save(with_report(pair.ticket("r", FIRST), talk.listener.address, of(1)))
    pair.decode.add("r", FIRST, tokens=500, params=ticket)
    pair.until(lambda: len(pair.decode.tokens.get("r", ())) > 3)
    pair.decode.abort("r")
    pair.settle()
    assert talk.used == 0
    pair.until(lambda: bool(talk.listener.saved))
    assert "did not finish" in talk.listener.saved[0].reason


def test_a_pool_that_is_too_small_for_a_block(engine: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=f"pool_bytes 10 is less than one block of all layers, {BLOCK_BYTES} bytes"):
        engine("kv_consumer", {"pool_bytes": 10})


# --- what a stranger found --------------------------------------------------------------------------------------------


def test_with_keys_as_the_documents_say(engine: Callable[..., Any], listener: Listener) -> None:
    """Each side lists the others' keys, not its own."""
    p, d, router = ([key.decode() for key in zmq.curve_keypair()] for _ in range(3))
    peers = {"allowed_keys": [p[0], d[0], router[0]]}
    decode = engine(
        "kv_consumer",
        POOL | {"public_key": d[0], "secret_key": d[1], "allowed_keys": [p[0], router[0]]},
    )
    prefill = engine("kv_both", {"public_key": p[0], "secret_key": p[1], "allowed_keys": [d[0], router[0]]})
    pair = Pair(prefill, decode)
    secure = Listener(Config(public_key=router[0], secret_key=router[1], **peers))
    try:
        params = with_report(PREFILL, secure.address, of(1))
        prefill.add("r", FIRST, params=params)
        pair.until(lambda: "r" in prefill.ended)
        ticket = with_save(with_report(prefill.params["r"] or {}, secure.address, of(1)))
        assert pair.decode_all("r", FIRST, ticket) == reference(FIRST, 3)
        pair.until(lambda: bool(secure.saved))
        assert secure.saved[0].ticket, secure.saved[0].reason
    finally:
        secure.close()


def test_a_reset_of_the_caches_empties_the_pool(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """After new weights were loaded, what was kept is of the old ones."""
    pair = talk.fresh()
    answer, ticket = talk.turn(pair, FIRST)
    pair.settle()
    assert talk.decode.scheduler.reset_prefix_cache(reset_connector=True)
    pool, deadline = talk.decode.worker.worker._pool.agent, time.monotonic() + 5
    while pool.gauges()["leases"]:  # without a step of D's, which has nothing to do
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other = talk.fresh()
    computed = computed_by(other.prefill, monkeypatch)
    prompt = [*FIRST, *answer, 3]
    assert talk.turn(other, prompt, ticket)[0] == reference(prompt, 5)
    assert sum(computed) == len(prompt)
    assert talk.used == 7, "of the second turn alone"


def test_an_engine_that_stands_still_keeps_nothing_of_strangers(talk: Talk) -> None:
    scheduler = talk.decode.scheduler.connector.scheduler
    before = len(scheduler._notes)
    for address in (scheduler.side.agent.address, scheduler.turns._agent.address):
        for _ in range(20):
            told = Saved(src=0, dst=0, of=of(1), ticket=bytes(2**20))
            talk.listener.call(talk.listener.agent.inform, address, told)
    time.sleep(0.5)
    assert len(scheduler._notes) == before
    assert not scheduler.turns._notes


def test_stats_of_several_connectors(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside vLLM's MultiConnector ours come in a dict."""
    worker = talk.decode.worker
    take = worker.get_kv_connector_stats

    def both() -> Any:
        stats = take()
        return None if stats is None else MultiKVConnectorStats(data={"PDConnector": stats, "Other": object()})

    seen: list[Any] = []
    monkeypatch.setattr(worker, "get_kv_connector_stats", both)
    update = talk.decode.scheduler.connector.update_connector_output
    connector = talk.decode.scheduler.connector
    monkeypatch.setattr(connector, "update_connector_output", lambda output: seen.append(update(output)))
    monkeypatch.setattr(talk.decode.scheduler, "log_stats", False)
    monkeypatch.setattr(MultiKVConnectorStats, "aggregate", lambda self, other: self)
    monkeypatch.setattr(MultiKVConnectorStats, "to_dict", lambda self: {})
    _, ticket = talk.turn(talk.fresh(), FIRST)
    assert ticket is not None
    assert seen


def test_a_copy_that_nobody_tells_of_is_given_up(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may lose stats; it does not lose the end of a request's blocks."""
    monkeypatch.setattr(metrics.PDStats, "take_saves", lambda self: [])
    pair = talk.fresh()
    _, ticket = talk.turn(pair, FIRST)
    assert ticket is None
    assert talk.used == 0
    pair.settle()


def test_a_hung_copy_frees_the_blocks_in_time(
    engine: Callable[..., Any], listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_pool, "_COPY_SECONDS", 1.0)
    script = tmp_path / "script"
    write_script(script)
    talk = Talk(engine, listener, **faulty(script))
    pair = talk.fresh()
    ticket = with_save(with_report(pair.ticket("r", FIRST), listener.address, of(1)))
    pair.decode.add("r", FIRST, tokens=5, params=ticket)
    pair.until(lambda: len(pair.decode.tokens.get("r", ())) > 1)
    write_script(script, Rule(action="drop"))
    pair.until(lambda: bool(listener.saved))
    assert not listener.saved[0].ticket
    pair.settle()
