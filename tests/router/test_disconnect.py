"""Clients that leave at each stage: both legs end, and P's blocks are released."""

from __future__ import annotations

import asyncio
import time

import pytest

from . import upstreams
from .conftest import World, eventually

GONE = 'pdc_router_requests_total{outcome="client_gone",route="/v1/completions"}'


async def test_gone_during_a_short_prefill_its_ticket_is_still_learned_and_released(world: World):
    await world.start()
    world.prefill[0].act = upstreams.slow(0.3, upstreams.prefill)
    writer = await world.send_and_keep({"stream": True})
    await eventually(lambda: world.prefill[0].running)
    writer.close()
    await eventually(lambda: world.broker.released, within_s=2)
    assert world.broker.released == world.prefill[0].tickets
    assert world.prefill[0].aborted == 0
    assert not world.decode[0].bodies, "D is not asked for a client that left"
    await world.assert_idle()
    await world.assert_counted(GONE, 1)


async def test_gone_during_a_long_prefill_aborts_it_within_two_seconds(world: World):
    await world.start()
    world.prefill[0].act = upstreams.hang
    writer = await world.send_and_keep({})
    await eventually(lambda: world.prefill[0].running)
    left = time.monotonic()
    writer.close()
    await eventually(lambda: world.prefill[0].aborted == 1)
    assert time.monotonic() - left < 2
    await world.assert_idle()
    await world.assert_counted(GONE, 1)
    assert world.broker.released == []


@pytest.mark.parametrize("stream", [True, False])
async def test_gone_between_p_and_ds_first_token_releases_the_ticket(world: World, stream: bool):
    await world.start()
    world.decode[0].act = upstreams.hang
    writer = await world.send_and_keep({"stream": stream})
    await eventually(lambda: world.decode[0].running)
    writer.close()
    await eventually(lambda: world.decode[0].aborted == 1 and world.broker.released, within_s=2)
    assert world.broker.released == world.prefill[0].tickets
    await world.assert_idle()
    await world.assert_counted(GONE, 1)


async def test_gone_after_ds_first_token_aborts_d_and_releases_nothing(world: World):
    await world.start()
    world.decode[0].act = upstreams.decode_and_stall
    async with world.session.post(world.url + "/v1/completions", json={"prompt": "p", "stream": True}) as response:
        await response.content.readany()
        response.close()
    await eventually(lambda: world.decode[0].aborted == 1, within_s=2)
    await world.assert_idle()
    assert world.broker.released == []
    await world.assert_counted(GONE, 1)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_gone_from_a_fanned_out_request_ends_every_choice(world: World, stage: str):
    await world.start(prefill=2, decode=2, abandon_grace_s=0.2)
    instances = getattr(world, stage)
    for instance in instances:
        instance.act = upstreams.hang
    writer = await world.send_and_keep({"prompt": ["a", "b"], "n": 2, "stream": True})
    await eventually(lambda: sum(instance.running for instance in instances) == 4)
    writer.close()
    await eventually(lambda: sum(instance.aborted for instance in instances) == 4, within_s=2)
    await world.assert_idle()
    issued = [ticket for instance in world.prefill for ticket in instance.tickets]
    assert len(issued) == (4 if stage == "decode" else 0)
    assert sorted(map(str, world.broker.released)) == sorted(map(str, issued))


async def test_gone_while_sending_its_body(world: World):
    await world.start()
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt"')
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await world.assert_idle()
    assert not world.prefill[0].bodies
    await world.assert_counted(GONE, 1)


async def test_gone_during_a_retry(world: World):
    await world.start(decode=2)
    world.decode[0].act = upstreams.status(500)
    world.decode[1].act = upstreams.hang
    writer = await world.send_and_keep({})
    await eventually(lambda: world.decode[1].running)
    writer.close()
    await eventually(lambda: len(world.broker.released) == 2, within_s=2)
    assert world.broker.released == world.prefill[0].tickets
    await world.assert_idle()


async def test_a_client_that_takes_no_bytes_is_given_up(world: World):
    await world.start(client_stall_s=0.3)
    flood = b"data: " + b'{"choices": [1]}' + b" " * 60_000 + b"\n\n"
    world.decode[0].act = upstreams.raw(flood * 400, "text/event-stream")
    writer = await world.send_and_keep({"stream": True})
    try:
        await eventually(lambda: world.decode[0].bodies)
        await world.assert_idle()
        await world.assert_counted(GONE, 1)
    finally:
        writer.close()


async def test_many_that_leave_at_random_stages_leave_nothing_behind(world: World):
    await world.start(prefill=2, decode=2)
    for instance in world.prefill:
        instance.act = upstreams.slow(0.05, upstreams.prefill)
    for instance in world.decode:
        instance.act = upstreams.slow(0.05, upstreams.decode)

    async def one(k: int) -> None:
        writer = await world.send_and_keep({"stream": bool(k % 2), "n": 1 + k % 3})
        await asyncio.sleep(0.004 * k)
        writer.close()

    await asyncio.gather(*(one(k) for k in range(40)))
    await world.assert_idle()
    issued = {str(ticket) for instance in world.prefill for ticket in instance.tickets}
    released = [str(ticket) for ticket in world.broker.released]
    assert len(released) == len(set(released)), "each once"
    assert set(released) <= issued
    served = {str(b["kv_transfer_params"]) for d in world.decode for b in d.bodies}
    assert issued - set(released) <= served, "a ticket that was not released has reached D"
    assert (await world.complete()).status == 200
