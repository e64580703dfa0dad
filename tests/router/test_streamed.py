"""Both legs at once: which hand-overs go so and why, and what becomes of leases when a leg fails or nobody waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from pd_connector.protocol.params import address_of, from_params, stream_of, stream_params, to_params, transfer_of
from pd_connector.protocol.ticket import Ticket
from pd_connector.router.policy import choose_mode

from . import upstreams
from .conftest import World, eventually
from .upstreams import Body, Instance

LONG = list(range(3000))


def real_ticket(instance: Instance, body: Body, engines: int = 1, port: int = 0) -> dict[str, Any]:
    chosen = transfer_of(body["kv_transfer_params"])
    assert chosen is not None
    ticket = Ticket(
        address=f"tcp://127.0.0.1:{port or instance.port}", incarnation=5, lease=1, epoch=1, capability=chosen[0],
        blocks=((1,),), tokens=3,
    )  # fmt: skip
    return to_params(ticket, request_id="r", engine_id="e", tp_size=1, pp_size=1, engines=engines)


def prefill_with(**options: Any) -> upstreams.Act:
    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        answer = upstreams.base(request) | {"choices": [{"index": 0, "text": "x"}]}
        return web.json_response(answer | {"kv_transfer_params": real_ticket(instance, body, **options)})

    return act


async def started(world: World, **settings: Any) -> World:
    """One request is behind it: the prefill instance's address is known."""
    await world.start(**settings)
    for instance in world.prefill:
        instance.act = prefill_with()
    for _ in world.prefill:
        assert (await world.complete()).headers["x-pdc-hand-over"].startswith("sequential: about 1 tokens")
    world.decode[0].bodies.clear()
    world.prefill[0].bodies.clear()
    world.prefill[0].answered.clear()
    return world


async def test_a_long_prompt_goes_to_both_at_once(world: World) -> None:
    await started(world)
    world.decode[0].script.append(upstreams.after(world.prefill[0], upstreams.decode))
    answer = await world.complete(LONG)
    assert answer.status == 200
    assert answer.headers["x-pdc-hand-over"] == "streamed: about 3000 tokens"
    (to_prefill,), (to_decode,) = world.prefill[0].bodies, world.decode[0].bodies
    chosen = transfer_of(to_prefill["kv_transfer_params"])
    assert chosen is not None
    assert chosen[1]
    assert stream_of(to_decode["kv_transfer_params"]) == (f"tcp://127.0.0.1:{world.prefill[0].port}", chosen[0])
    assert world.broker.released == []
    await world.assert_counted('pdc_router_hand_overs_total{mode="streamed",why="long"}', 1)
    await world.assert_idle()


async def test_the_first_long_prompt_learns_the_address(world: World) -> None:
    await world.start()
    world.prefill[0].act = prefill_with()
    assert "address is not known" in (await world.complete(LONG)).headers["x-pdc-hand-over"]
    assert (await world.complete(LONG)).headers["x-pdc-hand-over"].startswith("streamed")


async def test_several_engines_behind_one_url_are_not_streamed(world: World) -> None:
    await world.start()
    world.prefill[0].act = prefill_with(engines=2)
    for _ in range(2):
        assert "it has several" in (await world.complete(LONG)).headers["x-pdc-hand-over"]


async def test_a_busy_prefill_instance_gets_one_leg_after_the_other(world: World) -> None:
    await started(world, stream_max_queue=1)
    world.prefill[0].script.append(upstreams.slow(0.5, prefill_with()))
    world.decode[0].script.append(upstreams.slow(1.0, upstreams.decode))
    first = asyncio.create_task(world.complete(LONG))
    await eventually(lambda: world.prefill[0].running)
    second = await world.complete(LONG)
    assert second.headers["x-pdc-hand-over"].startswith("sequential: 1 other prefills")
    assert (await first).headers["x-pdc-hand-over"].startswith("streamed")


@pytest.mark.parametrize("failure", [upstreams.status(500), upstreams.drop, upstreams.status(400)])
async def test_prefill_fails_and_decode_answers_all_the_same(world: World, failure: upstreams.Act) -> None:
    await started(world)
    world.prefill[0].script.append(failure)
    world.decode[0].script.append(upstreams.after(world.prefill[0], upstreams.decode))
    answer = await world.complete(LONG)
    assert answer.status == 200
    (renounced,) = world.broker.renounced
    assert renounced[0] == f"tcp://127.0.0.1:{world.prefill[0].port}", "D must not wait for what will not come"
    await world.assert_idle()


async def test_prefill_answers_from_another_address(world: World) -> None:
    """It was restarted, and D asks where nobody is."""
    await started(world)
    world.prefill[0].script.append(prefill_with(port=1))
    world.decode[0].script.append(upstreams.after(world.prefill[0], upstreams.decode))
    assert (await world.complete(LONG)).status == 200
    assert len(world.broker.renounced) == 1
    world.prefill[0].act = prefill_with(port=1)
    await world.complete(LONG)
    found = stream_of(world.decode[0].bodies[-1]["kv_transfer_params"])
    assert found is not None
    assert found[0] == "tcp://127.0.0.1:1"


async def test_decode_fails_and_the_second_attempt_is_sequential(world: World) -> None:
    await started(world)
    world.decode[0].script.append(upstreams.status(500))
    answer = await world.complete(LONG)
    assert answer.status == 200
    assert answer.headers["x-pdc-hand-over"] == "sequential: an attempt to stream it failed"
    assert len(world.broker.renounced) == 1
    assert from_params(world.decode[0].bodies[-1]["kv_transfer_params"]).lease == 1
    await world.assert_idle()


async def test_decode_answers_before_prefill(world: World) -> None:
    """It has computed the prompt by itself, or had it cached: nobody will read P's blocks."""
    await started(world)
    world.prefill[0].script.append(upstreams.hang)
    assert (await world.complete(LONG)).status == 200
    assert len(world.broker.renounced) == 1
    await eventually(lambda: world.prefill[0].aborted == 1)
    await world.assert_idle()


async def test_a_refusal_of_decode_is_the_clients(world: World) -> None:
    await started(world)
    world.decode[0].script.append(upstreams.status(422))
    assert (await world.complete(LONG)).status == 422
    assert len(world.broker.renounced) == 1


async def test_a_client_that_leaves(world: World) -> None:
    await started(world)
    world.prefill[0].script.append(upstreams.hang)
    world.decode[0].script.append(upstreams.hang)
    writer = await world.send_and_keep({"prompt": LONG})
    await eventually(lambda: world.prefill[0].running and world.decode[0].running)
    writer.close()
    await eventually(lambda: world.broker.renounced)
    await world.assert_idle()


async def test_a_client_that_leaves_a_sequential_one(world: World) -> None:
    """P's answer may have been lost on its way with the ticket in it: the capability is ours."""
    await started(world, abandon_grace_s=0.05)
    world.prefill[0].script.append(upstreams.hang)
    writer = await world.send_and_keep({"prompt": "short"})
    await eventually(lambda: world.prefill[0].running)
    writer.close()
    await eventually(lambda: world.broker.renounced)
    chosen = transfer_of(world.prefill[0].bodies[-1]["kv_transfer_params"])
    assert chosen is not None
    assert world.broker.renounced == [(f"tcp://127.0.0.1:{world.prefill[0].port}", chosen[0])]


async def test_a_sequential_answer_that_is_lost_with_its_ticket(world: World) -> None:
    await started(world)

    async def broken(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "500"})
        await response.prepare(request)
        await response.write(b'{"choices')
        assert request.transport is not None
        request.transport.abort()
        return response

    world.prefill[0].script.append(broken)
    assert (await world.complete("short")).status == 200
    chosen = transfer_of(world.prefill[0].bodies[0]["kv_transfer_params"])
    assert chosen is not None
    assert [transfer for _, transfer in world.broker.renounced] == [chosen[0]]


async def test_no_attempt_is_streamed_after_one_has_failed(world: World) -> None:
    await started(world, decode=2, retries=3)
    for instance in world.decode:
        instance.script.append(upstreams.status(500))
    answer = await world.complete(LONG)
    assert answer.headers["x-pdc-hand-over"] == "sequential: an attempt to stream it failed"
    assert [transfer_of(body["kv_transfer_params"])[1] for body in world.prefill[0].bodies] == [True, False, False]  # type: ignore[index]


async def test_choices_are_streamed_each(world: World) -> None:
    await started(world)
    world.decode[0].act = upstreams.slow(0.3, upstreams.decode)  # else it has answered before P was asked
    answer = await world.complete(LONG, n=3)
    assert answer.status == 200
    transfers = {transfer_of(body["kv_transfer_params"]) for body in world.prefill[0].bodies}
    assert len(transfers) == 3


def test_the_reasons_are_told_apart() -> None:
    found = [
        choose_mode(10, 100, "tcp://x:1", 0, 4).code,
        choose_mode(100, 100, None, 0, 4).code,
        choose_mode(100, 100, "tcp://x:1", 4, 4).code,
        choose_mode(100, 100, "tcp://x:1", 3, 4).code,
    ]
    assert found == ["short", "unknown", "queue", "long"]


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:5", "tcp://[::1]:5", f"tcp://host:5#{'ab' * 32}"])
def test_an_address_survives_its_way(address: str) -> None:
    assert stream_of(stream_params(address, bytes(16))) == (address, bytes(16))


@pytest.mark.parametrize(
    "pdc",
    [
        None,
        5,
        [],
        "x",
        {},
        {"transfer": 5, "stream": True},
        {"transfer": "zz", "stream": True},
        {"transfer": "00" * 15},
    ],
)
def test_nonsense_is_no_stream(pdc: Any) -> None:
    params = {"pdc": pdc, "remote_host": "h", "remote_port": 5}
    assert stream_of(params) is None
    assert address_of(params) is None


@pytest.mark.parametrize("where", [{}, {"remote_host": "a b"}, {"remote_port": "x"}, {"remote_host": "h" * 300}])
def test_nowhere_is_no_stream(where: dict[str, Any]) -> None:
    params = {"pdc": {"transfer": "00" * 16, "stream": True}, "remote_host": "h", "remote_port": 5} | where
    assert stream_of({} if not where else params) is None
