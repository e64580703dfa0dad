"""Turns of a conversation at the router: who is asked to keep what, and which prefill gets it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pd_connector import Agent, Config
from pd_connector.protocol.messages import Saved
from pd_connector.protocol.params import from_params, prefix_of, report_of, to_params, wants_save
from pd_connector.protocol.ticket import Ticket
from pd_connector.router import AgentBroker
from pd_connector.router.conversations import Conversations, Kept, keys_of
from pd_connector.router.metrics import RouterMetrics
from pd_connector.router.turns import Turns

from . import upstreams
from .conftest import RecordingBroker, World, eventually
from .upstreams import Body, Instance

NAMED = {"x_pdc_conversation": "talk 1"}


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(texts)]


def returned(number: int) -> bytes:
    ticket = Ticket(
        address="tcp://127.0.0.1:7", incarnation=5, lease=number, epoch=1, capability=bytes(16), blocks=((1, 2),),
        tokens=20, key=b"k", marks=((16, b"m"),),
    )  # fmt: skip
    return ticket.to_bytes()


def as_params(ticket: bytes) -> dict[str, Any]:
    return to_params(Ticket.from_bytes(ticket), request_id="", engine_id="", tp_size=1, pp_size=1)


def keeping(world: World, answer: bytes, after: float = 0.0) -> upstreams.Act:
    """A decode instance that keeps what it is asked to."""

    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        response = await upstreams.decode(instance, request, body)
        params = body.get("kv_transfer_params") or {}
        if wants_save(params):
            wanted = report_of(params)
            assert wanted is not None

            def tell() -> None:
                world.broker.saved(wanted[1], answer, 60.0, "" if answer else "no room")

            asyncio.get_running_loop().call_later(after, lambda: world.server_call(tell))
        return response

    return act


async def started(world: World, **settings: Any) -> World:
    await world.start(**settings)
    world.broker.address = "tcp://127.0.0.1:9"
    return world


def prefix_given(world: World, turn: int) -> Any:
    found = prefix_of(world.prefill[0].bodies[turn]["kv_transfer_params"])
    return None if found is None else from_params(found).lease


async def test_the_next_turn_of_a_chat_gets_what_the_last_one_left(world: World) -> None:
    await started(world)
    world.decode[0].act = keeping(world, returned(3))
    first = chat("hello")
    await world.chat(messages=first)
    await world.assert_counted('pdc_router_turns_total{outcome="kept"}', 1)
    second = [*first, *chat("x", "an answer", "and now?")[1:]]
    await world.chat(messages=second)
    assert prefix_given(world, 0) is None
    assert prefix_given(world, 1) == 3
    await world.assert_counted('pdc_router_turns_total{outcome="read"}', 1)
    await eventually(lambda: [params["pdc"]["lease"] for params in world.broker.released] == [3])
    # It is used only once, but what the second turn left is there.
    await world.chat(messages=first)
    assert prefix_given(world, 2) is None
    await world.chat(messages=[*second, *chat("x", "another answer", "go on")[1:]])
    assert prefix_given(world, 3) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_conversation(world: World, stream: bool) -> None:
    """A plain completion says nothing of what it continues."""
    await started(world)
    world.decode[0].act = keeping(world, returned(4))
    for turn in range(3):
        await world.post("/v1/completions", {"prompt": f"turn {turn}", "stream": stream}, **NAMED)
        await world.assert_counted('pdc_router_turns_total{outcome="kept"}', 2 * turn + 1)
        await world.post("/v1/completions", {"prompt": "somebody else"}, x_pdc_conversation=f"other {turn}")
        await world.post("/v1/completions", {"prompt": "nobody's"})
    assert [prefix_given(world, 3 * turn) for turn in range(3)] == [None, 4, 4]
    assert all(prefix_given(world, 3 * turn + other) is None for turn in range(3) for other in (1, 2))


async def test_two_clients_do_not_share_a_conversation(world: World) -> None:
    await started(world)
    world.decode[0].act = keeping(world, returned(4))
    body = {"prompt": "p", "max_tokens": 3}
    await world.post("/v1/completions", body, Authorization="Bearer a", **NAMED)
    await world.assert_counted('pdc_router_turns_total{outcome="kept"}', 1)
    await world.post("/v1/completions", body, Authorization="Bearer b", **NAMED)
    await world.post("/v1/completions", body | {"cache_salt": "s"}, Authorization="Bearer a", **NAMED)
    await world.post("/v1/completions", body, Authorization="Bearer a", **NAMED)
    assert [prefix_given(world, turn) for turn in range(4)] == [None, None, None, 4]


async def test_a_turn_that_follows_at_once_waits_for_what_is_being_kept(world: World) -> None:
    await started(world, turn_wait_s=2.0)
    world.decode[0].act = keeping(world, returned(4), after=0.3)
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    assert prefix_given(world, 1) == 4


async def test_an_instance_that_never_tells_is_not_waited_for_long(world: World) -> None:
    await started(world, turn_wait_s=0.2)
    for _ in range(2):
        assert (await world.post("/v1/completions", {"prompt": "p"}, **NAMED)).status == 200
    assert prefix_given(world, 1) is None


async def test_what_was_not_kept(world: World) -> None:
    await started(world)
    world.decode[0].act = keeping(world, b"")
    for _ in range(2):
        await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    await world.assert_counted('pdc_router_turns_total{outcome="not_kept"}', 2)
    assert prefix_given(world, 1) is None


async def test_a_prefill_that_fails_on_a_prefix_computes_in_the_next_attempt(world: World) -> None:
    await started(world)
    world.decode[0].act = keeping(world, returned(4))
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    await world.assert_counted('pdc_router_turns_total{outcome="kept"}', 1)
    world.prefill[0].script.append(upstreams.drop)
    assert (await world.post("/v1/completions", {"prompt": "p"}, **NAMED)).status == 200
    assert [prefix_given(world, turn) for turn in range(3)] == [None, 4, None]
    await eventually(lambda: [params["pdc"]["lease"] for params in world.broker.released] == [4])


async def test_the_newest_conversations_are_remembered(world: World) -> None:
    await started(world, turns=2)
    for number in range(4):
        world.decode[0].act = keeping(world, returned(number))
        await world.post("/v1/completions", {"prompt": "p"}, x_pdc_conversation=f"{number}")
        await world.assert_counted('pdc_router_turns_total{outcome="kept"}', number + 1)
    await world.assert_counted('pdc_router_turns_total{outcome="dropped"}', 2)
    await eventually(lambda: [params["pdc"]["lease"] for params in world.broker.released] == [0, 1])


@pytest.mark.parametrize("case", ["off", "several", "unreachable"])
async def test_nobody_is_asked_to_keep_anything(world: World, case: str) -> None:
    await started(world, turns=0 if case == "off" else 10)
    world.broker.address = "" if case == "unreachable" else world.broker.address
    for _ in range(2):
        await world.post("/v1/completions", {"prompt": "p", "n": 2 if case == "several" else 1}, **NAMED)
    assert not any(wants_save(body.get("kv_transfer_params") or {}) for body in world.decode[0].bodies)


async def test_a_client_cannot_point_a_prefill_at_blocks(world: World) -> None:
    await started(world)
    evil = {
        "do_remote_decode": True,
        "pdc": {"prefix": as_params(returned(6)), "save": True, "report": {"to": "tcp://evil:1"}},
    }
    await world.complete(kv_transfer_params=evil)
    for instance in (world.prefill[0], world.decode[0]):
        assert "evil" not in str(instance.bodies[0])
    assert prefix_given(world, 0) is None


# --- pure -------------------------------------------------------------------------------------------------------------


def test_keys_of_a_chat() -> None:
    body = {"model": "m", "messages": chat("a", "b", "c", "d", "e")}
    keys = keys_of(None, "k", body)
    assert len(keys) == 3
    assert keys[1:] == keys_of(None, "k", body | {"messages": chat("a", "b", "c")})
    assert keys[2:] == keys_of(None, "k", body | {"messages": chat("a")})
    for other in ({"model": "n"}, {"cache_salt": "s"}, {"messages": chat("A", "b", "c", "d", "e")}):
        assert not set(keys) & set(keys_of(None, "k", body | other))
    assert not set(keys) & set(keys_of(None, "other", body))
    assert keys_of("name", "k", body) == keys_of("name", "k", {"model": "m", "prompt": "p"})
    tools = [{"role": "system", "content": "s"}, *chat("a"), {"role": "assistant"}, {"role": "tool", "content": "4"}]
    assert len(keys_of(None, "k", {"messages": tools})) == 2
    for messages in (None, "x", [], {}, 5):
        assert keys_of(None, "k", {"messages": messages}) == ()
    assert keys_of(None, "k", {"messages": [1, None, "x", []]})


@given(st.lists(st.tuples(st.sampled_from(["begin", "tell", "end", "nothing", "take", "forget"]), st.integers(0, 5))))
def test_tickets_are_neither_lost_nor_used_twice(steps: list[tuple[str, int]]) -> None:
    conversations, made, out = Conversations(3), 0, []
    for now, (what, number) in enumerate(steps):
        key, of = bytes([number]), bytes([number, 1])
        if what == "begin":
            conversations.begin(of, key)
        elif what == "tell":
            made += of in conversations._awaited
            out += [kept.ticket for kept in conversations.told(of, Kept(b"%d" % made, 1e9))]
        elif what == "end":
            conversations.end(of, now + 2)
        elif what == "nothing":
            assert conversations.told(of, None) == []
        elif what == "forget":
            conversations.forget(of)
        elif (kept := conversations.take([key], now)) is not None:
            out.append(kept)
        assert len(set(out)) == len(out)
        assert len(conversations._kept) == made - len(out) <= 3
        assert len(conversations._awaited) <= 3
        assert {of for of, _ in conversations._ending.values()} <= set(conversations._awaited)
        assert conversations._bytes == sum(len(kept.ticket) for kept in conversations._kept.values())


def test_an_expired_ticket_is_not_given_out() -> None:
    conversations = Conversations(3)
    conversations.begin(b"o", b"k")
    conversations.told(b"o", Kept(b"t", 10.0))
    assert conversations.take([b"k"], 11.0) is None
    assert len(conversations) == 0


# --- the broker's agent -----------------------------------------------------------------------------------------------


async def test_an_agent_tells_what_it_kept() -> None:
    told: list[Any] = []
    async with AgentBroker(Config()) as broker, Agent() as instance:
        broker.listen(lambda *args: told.append(args))
        address = broker.address_for("http://127.0.0.1:1")
        instance.inform(address, Saved(src=0, dst=0, of=bytes(16), ticket=b"t", remaining_ms=1500, reason="r"))
        await eventually(lambda: bool(told))
    assert told == [(bytes(16), b"t", 1.5, "r")]


async def test_what_strangers_keep_is_not_even_looked_at(world: World) -> None:
    """Else they could have the router dial any address, or read tickets all day."""
    await started(world)
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    for content in (returned(1), b"nonsense", bytes(2**20)):
        world.server_call(lambda content=content: world.broker.saved(b"x" * 16, content, 60.0, ""))
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    assert prefix_given(world, 1) is None
    assert world.broker.released == []


async def test_a_ticket_that_is_none(world: World) -> None:
    await started(world)
    world.decode[0].act = keeping(world, b"nonsense")
    for _ in range(2):
        await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
        await world.assert_idle()
    assert prefix_given(world, 1) is None


async def test_a_wait_has_one_end_however_many_wait(world: World) -> None:
    """Turns of one conversation keep ending, and their instance never tells."""
    await started(world, turn_wait_s=0.4)
    begun = asyncio.get_running_loop().time()
    await asyncio.gather(*(world.post("/v1/completions", {"prompt": "p"}, **NAMED) for _ in range(6)))
    for _ in range(3):
        await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    assert asyncio.get_running_loop().time() - begun < 10
    ledgers = await (await world.session.get(f"{world.url}/ledger")).json()
    assert max(ledger["stages_ms"]["turn"] for ledger in ledgers) > 100, "a wait is not the router's own work"
    assert max(ledger["stages_ms"]["router"] for ledger in ledgers) < 300


async def test_those_who_leave_while_they_wait_leave_nothing() -> None:
    turns = Turns(5, 5.0, RecordingBroker(), RouterMetrics())
    turns.begin(b"o", [b"k"])
    turns.end(b"o", done=True)
    waiting = [asyncio.create_task(turns.take([b"k"])) for _ in range(20)]
    await asyncio.sleep(0.05)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert not turns._waiting


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_prefill_that_answers_an_error_for_what_is_gone(world: World, streamed: bool) -> None:
    """vLLM's default is to fail where a load fails; the only prefill instance is asked again, without the prefix."""
    await started(world, retries=1)
    world.decode[0].act = keeping(world, returned(4))
    await world.post("/v1/completions", {"prompt": "p"}, **NAMED)
    await world.assert_counted('pdc_router_turns_total{outcome="kept"}', 1)
    world.prefill[0].script.append(upstreams.status(500))
    assert (await world.post("/v1/completions", {"prompt": "p", "stream": streamed}, **NAMED)).status == 200
    assert [prefix_given(world, turn) for turn in range(3)] == [None, 4, None]


async def test_a_chat_that_is_nested_too_deeply(world: World) -> None:
    await world.start()
    deep = b'{"model":"m","messages":' + b"[" * 800 + b"]" * 800 + b"}"
    answer = await world.post("/v1/chat/completions", deep)
    assert answer.status == 400
    assert b"nested too deeply" in answer.content
