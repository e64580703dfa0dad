"""Upstreams that fail, each in its own way, before and after the first token."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from . import upstreams
from .conftest import World

WRONG_ANSWERS: dict[str, upstreams.Act] = {
    "500": upstreams.status(500),
    "503": upstreams.status(503),
    "dropped": upstreams.drop,
    "empty 200": upstreams.raw(b""),
    "malformed": upstreams.raw(b'{"choices": ['),
    "no choices": upstreams.raw(b"{}"),
    "empty choices": upstreams.raw(b'{"choices": []}'),
    "choices that are none": upstreams.raw(b'{"choices": [5]}'),
    "error in 200": upstreams.raw(b'{"error": {"message": "Internal server error", "code": 500}}'),
}
WRONG_STREAMS = {
    "500": upstreams.status(500),
    "dropped": upstreams.drop,
    "empty 200": upstreams.raw(b"", "text/event-stream"),
    "only done": upstreams.raw(b"data: [DONE]\n\n", "text/event-stream"),
    "not events": upstreams.raw(b"<html>", "text/html"),
    "error event": upstreams.error_event(500),
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS)
async def test_a_failing_prefill_is_retried_on_another(world: World, wrong: str):
    await world.start(prefill=2)
    world.prefill[0].act = WRONG_ANSWERS[wrong]
    answer = await world.complete()
    assert answer.status == 200
    assert [len(instance.bodies) for instance in world.prefill] == [1, 1]
    assert answer.headers["x-pdc-prefill"] == world.prefill[1].url
    assert await world.metric('pdc_router_retries_total{leg="prefill"}') == 1
    assert await world.metric(f'pdc_router_leg_failures_total{{leg="prefill",upstream="{world.prefill[0].url}"}}') == 1
    await world.assert_idle()


@pytest.mark.parametrize("wrong", WRONG_ANSWERS)
async def test_a_failing_decode_is_retried_with_a_fresh_ticket(world: World, wrong: str):
    await world.start(decode=2)
    world.decode[0].act = WRONG_ANSWERS[wrong]
    await check_fresh_ticket(world, await world.complete())


@pytest.mark.parametrize("kind", ["complete", "chat"])
@pytest.mark.parametrize("wrong", WRONG_STREAMS)
async def test_a_failing_decode_stream_is_retried_before_its_first_token(world: World, wrong: str, kind: str):
    await world.start(decode=2)
    world.decode[0].act = WRONG_STREAMS[wrong]
    answer = await getattr(world, kind)(stream=True)
    assert answer.chunks
    assert b"error" not in answer.content
    await check_fresh_ticket(world, answer)


async def check_fresh_ticket(world: World, answer: Any) -> None:
    assert answer.status == 200
    assert answer.headers["x-pdc-decode"] == world.decode[1].url
    old, fresh = world.prefill[0].tickets
    assert world.broker.released == [old]
    assert world.decode[1].bodies[0]["kv_transfer_params"] == fresh
    await world.assert_idle()


async def test_a_single_decode_that_failed_on_its_ticket_is_tried_again_once(world: World):
    await world.start()
    world.decode[0].script.append(upstreams.error_event(500))
    assert (await world.complete(stream=True)).status == 200
    world.decode[0].act = upstreams.error_event(500)
    answer = await world.complete(stream=True)
    assert answer.status == 502
    assert len(world.decode[0].bodies) == 4
    assert len(world.broker.released) == 3
    await world.assert_idle()


@pytest.mark.parametrize("kind", ["complete", "chat"])
@pytest.mark.parametrize("stream", [True, False])
async def test_when_every_decode_fails_the_status_is_a_real_5xx(world: World, kind: str, stream: bool):
    await world.start(decode=2)
    for instance in world.decode:
        instance.act = upstreams.error_event(500) if stream else upstreams.raw(b'{"error": {"message": "boom"}}')
    answer = await getattr(world, kind)(stream=stream)
    assert answer.status == 502
    assert answer.error["type"] == "upstream_error"
    assert "decode leg on http://127.0.0.1" in answer.error["message"]
    assert "2 attempts" in answer.error["message"] or "3 attempts" in answer.error["message"]
    assert sorted(map(str, world.broker.released)) == sorted(map(str, world.prefill[0].tickets))
    await world.assert_idle()


async def test_attempts_are_bounded(world: World):
    await world.start(prefill=6, retries=2)
    for instance in world.prefill:
        instance.act = upstreams.status(500)
    answer = await world.complete()
    assert answer.status == 502
    assert sum(len(instance.bodies) for instance in world.prefill) == 3
    assert "prefill leg" in answer.error["message"]
    assert "answered 500" in answer.error["message"]


async def test_a_single_prefill_that_answers_500_is_not_asked_again(world: World):
    await world.start()
    world.prefill[0].act = upstreams.status(500)
    assert (await world.complete()).status == 502
    assert len(world.prefill[0].bodies) == 1


async def test_a_single_prefill_whose_connection_broke_is_asked_once_more(world: World):
    await world.start()
    world.prefill[0].script.append(upstreams.drop)
    assert (await world.complete()).status == 200
    world.prefill[0].act = upstreams.drop
    answer = await world.complete()
    assert answer.status == 502
    assert len(world.prefill[0].bodies) == 4


async def test_nobody_listens(world: World):
    await world.start()
    await world.prefill[0].stop()
    answer = await world.complete()
    assert answer.status == 503
    assert "cannot connect" in answer.error["message"]
    assert await world.metric(f'pdc_router_upstream_up{{leg="prefill",upstream="{world.prefill[0].url}"}}') == 0


async def test_a_dead_instance_is_put_aside_and_comes_back(world: World):
    await world.start(prefill=2, cooldown_s=0.5)
    dead = world.prefill[0]
    await dead.stop()
    for _ in range(6):
        assert (await world.complete()).status == 200
    retries = await world.metric('pdc_router_retries_total{leg="prefill"}')
    assert 1 <= retries < 6, "not every request runs into the dead one"
    await dead.start()
    await asyncio.sleep(0.6)
    for _ in range(4):
        await world.complete()
    assert dead.bodies, "used again after its cool-down"


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("code", [400, 401, 404, 422, 429])
async def test_a_4xx_is_passed_on_unchanged_and_not_retried(world: World, leg: str, code: int):
    await world.start(prefill=2, decode=2)
    body = {"error": {"message": "no such model", "type": "NotFoundError", "param": None, "code": code}}
    for instance in getattr(world, leg):
        instance.act = upstreams.status(code, body)
    answer = await world.complete(stream=True)
    assert (answer.status, answer.json) == (code, body)
    assert sum(len(instance.bodies) for instance in getattr(world, leg)) == 1
    issued = [ticket for instance in world.prefill for ticket in instance.tickets]
    assert world.broker.released == issued
    assert len(issued) == (1 if leg == "decode" else 0)
    await world.assert_idle()


async def test_a_4xx_as_a_first_event_becomes_a_real_4xx(world: World):
    await world.start(decode=2)
    for instance in world.decode:
        instance.act = upstreams.error_event(400)
    answer = await world.chat(stream=True)
    assert answer.status == 400
    assert answer.error["code"] == 400
    assert sum(len(instance.bodies) for instance in world.decode) == 1
    assert len(world.broker.released) == 1


async def test_prefill_timeout_moves_to_another(world: World):
    await world.start(prefill=2, prefill_s=0.3)
    world.prefill[0].act = upstreams.hang
    assert (await world.complete()).status == 200
    world.prefill[1].act = upstreams.hang
    answer = await world.complete()
    assert answer.status == 504
    assert answer.error["type"] == "timeout"
    await world.assert_idle()
    assert world.prefill[0].aborted + world.prefill[1].aborted == 3, "hung requests are aborted"


async def test_decode_that_stays_silent_times_out(world: World):
    await world.start(decode_idle_s=0.3)
    world.decode[0].act = upstreams.hang
    answer = await world.complete(stream=True)
    assert answer.status == 504
    assert world.broker.released == world.prefill[0].tickets
    await world.assert_idle()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_the_deadline_over_all_attempts(world: World, leg: str):
    await world.start(first_token_s=0.4, abandon_grace_s=0.1)
    getattr(world, leg)[0].act = upstreams.hang
    answer = await world.complete(stream=True)
    assert answer.status == 504
    assert f"{leg} leg on {getattr(world, leg)[0].url}" in answer.error["message"]
    assert world.broker.released == world.prefill[0].tickets
    await world.assert_idle()
    assert getattr(world, leg)[0].aborted == 1


@pytest.mark.parametrize("how", [upstreams.decode_and_drop, upstreams.decode_without_done])
async def test_after_the_first_token_a_failure_ends_the_stream_with_an_error_event(world: World, how: upstreams.Act):
    await world.start(decode=2)
    world.decode[0].act = how
    answer = await world.complete(stream=True)
    assert answer.status == 200
    assert "[DONE]" not in answer.events
    error = json.loads(answer.events[-1])["error"]
    assert f"decode leg on {world.decode[0].url}" in error["message"]
    assert error["code"] == 502
    assert not world.decode[1].bodies, "not retried: the client has tokens already"
    assert world.broker.released == [], "D took the blocks"
    await world.assert_counted('pdc_router_requests_total{outcome="broken",route="/v1/completions"}', 1)
    await world.assert_idle()


async def test_decode_that_falls_silent_midway(world: World):
    await world.start(decode_idle_s=0.3)
    world.decode[0].act = upstreams.decode_and_stall
    answer = await world.complete(stream=True)
    assert json.loads(answer.events[-1])["error"]["code"] == 504
    await world.assert_idle()


@pytest.mark.parametrize(
    "how", [upstreams.decode_and_drop, upstreams.decode_without_done, upstreams.decode_with_late_error]
)
async def test_one_choice_that_breaks_off_ends_the_merged_stream(world: World, how: upstreams.Act):
    await world.start()
    world.decode[0].script.append(how)
    answer = await world.complete(n=3, stream=True)
    assert answer.status == 200
    assert "[DONE]" not in answer.events
    assert "error" in json.loads(answer.events[-1])
    assert not any("error" in json.loads(event) for event in answer.events[:-1])
    await world.assert_idle()


async def test_one_choice_that_fails_at_its_start_is_retried_alone(world: World):
    await world.start(prefill=2, decode=2)
    world.prefill[0].script.append(upstreams.status(500))
    world.decode[0].script.append(upstreams.error_event(500))
    answer = await world.complete(["a", "b"], n=2, stream=True)
    assert {choice["index"] for chunk in answer.chunks for choice in chunk["choices"]} == {0, 1, 2, 3}
    assert len(world.broker.released) == 1
    await world.assert_idle()


async def test_one_choice_that_is_refused_ends_all_and_releases_their_tickets(world: World):
    await world.start()
    world.decode[0].script.append(upstreams.slow(0.3, upstreams.status(400)))
    world.decode[0].act = upstreams.hang
    answer = await world.complete(n=3)
    assert answer.status == 400
    await world.assert_idle()
    assert world.decode[0].aborted == 2
    assert len(world.prefill[0].tickets) == 3
    released = sorted(ticket["remote_block_ids"] for ticket in world.broker.released)
    assert released == [[0], [1], [2]]


@pytest.mark.parametrize("trouble", ["raises", "hangs"])
async def test_a_broker_in_trouble_does_not_hurt_the_request(world: World, trouble: str):
    await world.start(decode=2)

    async def behave() -> None:
        if trouble == "raises":
            raise RuntimeError("side channel closed")
        await asyncio.sleep(30)

    world.broker.behave = behave
    world.decode[0].act = upstreams.status(500)
    assert (await world.complete()).status == 200
    await world.assert_idle()
    await world.assert_counted("pdc_router_release_failures_total", 1)


async def test_an_answer_without_end_is_bounded(world: World):
    await world.start(max_response_bytes=10_000)
    world.decode[0].act = upstreams.raw(b"x" * 20_000)
    answer = await world.complete()
    assert answer.status == 502
    assert "max_response_bytes" in answer.error["message"]


async def test_a_merged_stream_with_a_choice_that_is_none_ends_in_an_error_event(world: World):
    await world.start()
    events = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [5]}\n\n'
    world.decode[0].act = upstreams.raw(events, "text/event-stream")
    answer = await world.complete(stream=True, n=2)
    assert b"a choice that is none" in answer.content
    assert b"error" in answer.content
    await world.assert_idle()
