"""Requests that go well: both legs, headers, streams, batches and n, balancing, the side routes."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from . import upstreams
from .conftest import World
from .upstreams import words_of

TEXT = "".join(words_of({"prompt": "hello"}))


async def test_plain_completion_carries_the_ticket_from_p_to_d(world: World):
    await world.start()
    answer = await world.complete(temperature=0.5)
    assert answer.status == 200
    assert answer.json["choices"] == [{"text": TEXT, "index": 0, "finish_reason": "length"}]
    [to_p], [to_d] = world.prefill[0].bodies, world.decode[0].bodies
    assert (to_p["max_tokens"], to_p["stream"], to_p["n"], to_p["temperature"]) == (1, False, 1, 0.5)
    ticket = to_d.pop("kv_transfer_params")
    assert ticket == world.prefill[0].tickets[0]
    assert to_d == {"model": "tiny", "prompt": "hello", "max_tokens": 3, "temperature": 0.5}
    assert world.broker.released == [], "D used the ticket"
    await world.assert_idle()


async def test_stream_is_passed_on_byte_for_byte(world: World):
    await world.start()
    odd = b': keep-alive\n\ndata: {"choices":[{"text":"\xc3\xa9",  "index":0}]}\r\n\r\n'
    odd += b'data:   {"choices": [1]}\n\ndata: [DONE]\n\n'
    world.decode[0].act = upstreams.raw(odd, "text/event-stream")
    answer = await world.complete(stream=True)
    assert answer.status == 200
    assert answer.content == odd


@pytest.mark.parametrize("kind", ["complete", "chat"])
async def test_stream(world: World, kind: str):
    await world.start()
    answer = await getattr(world, kind)(stream=True, stream_options={"include_usage": True})
    chunks = answer.chunks
    pieces = [choice.get("text", choice.get("delta", {}).get("content")) for c in chunks for choice in c["choices"]]
    assert "".join(pieces) == (TEXT if kind == "complete" else "".join(words_of({})))
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert "stream_options" not in world.prefill[0].bodies[0]
    await world.assert_idle()


async def test_stream_reaches_the_client_before_it_ends(world: World):
    await world.start()
    world.decode[0].act = upstreams.decode_and_stall
    async with (
        asyncio.timeout(10),
        world.session.post(world.url + "/v1/completions", json={"prompt": "p", "stream": True}) as r,
    ):
        first = await r.content.readany()
    assert first.startswith(b"data: {")


async def test_chat_plain(world: World):
    await world.start()
    answer = await world.chat(max_completion_tokens=9)
    assert answer.json["choices"][0]["message"]["role"] == "assistant"
    [to_p], [to_d] = world.prefill[0].bodies, world.decode[0].bodies
    assert (to_p["max_tokens"], to_p["max_completion_tokens"]) == (1, 1)
    assert (to_d["max_tokens"], to_d["max_completion_tokens"]) == (3, 9)


async def test_no_ticket_lets_d_compute_and_is_counted(world: World):
    await world.start()
    world.prefill[0].act = upstreams.prefill_without_ticket
    answer = await world.complete(kv_transfer_params={"remote_host": "forged"})
    assert answer.status == 200
    assert "kv_transfer_params" not in world.decode[0].bodies[0]
    assert await world.metric("pdc_router_ticketless_total") == 1


async def test_headers_go_to_both_legs_and_come_back(world: World):
    await world.start()
    answer = await world.post(
        "/v1/completions",
        {"prompt": "p"},
        Authorization="Bearer abc",
        X_Request_Id="my-id",
        traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01",
        X_Custom="kept",
        Connection="X-Private, keep-alive",
        X_Private="hop",
        Proxy_Authorization="Basic zzz",
    )
    assert answer.headers["x-request-id"] == "my-id"
    for seen in (world.prefill[0].headers[0], world.decode[0].headers[0]):
        assert seen["authorization"] == "Bearer abc"
        assert seen["x-request-id"] == "my-id"
        assert seen["traceparent"].split("-")[1] == "ab" * 16
        assert seen["x-custom"] == "kept"
        assert seen["content-type"] == "application/json"
        assert "x-private" not in seen
        assert "proxy-authorization" not in seen
        assert seen["host"] != f"127.0.0.1:{world.port}"


@pytest.mark.parametrize("given", [None, "has space", "x" * 300])
async def test_a_request_id_is_made_up_when_there_is_no_usable_one(world: World, given: str | None):
    await world.start()
    answer = await world.post("/v1/completions", {"prompt": "p"}, **({"X_Request_Id": given} if given else {}))
    made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert [i.headers[0]["x-request-id"] for i in (world.prefill[0], world.decode[0])] == [made, made]


async def test_the_response_names_its_stages_and_upstreams(world: World):
    await world.start()
    world.prefill[0].act = upstreams.slow(0.2, upstreams.prefill)
    answer = await world.complete(stream=True)
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert float(stages["unaccounted"]) >= 200, "the instances of this test tell nothing"
    assert float(stages["router"]) < 200
    assert answer.headers["x-pdc-prefill"] == world.prefill[0].url
    assert answer.headers["x-pdc-decode"] == world.decode[0].url


async def test_batch_and_n_plain(world: World):
    await world.start(prefill=2, decode=2)
    answer = await world.complete(["ab", "cde"], n=2, seed=10, model="tiny")
    assert answer.status == 200
    expected = [("ab", 10), ("ab", 11), ("cde", 10), ("cde", 11)]
    texts = ["".join(words_of({"prompt": prompt, "seed": seed})) for prompt, seed in expected]
    assert [(c["index"], c["text"]) for c in answer.json["choices"]] == list(enumerate(texts))
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 12, 17)
    tickets = [t["remote_request_id"] for p in world.prefill for t in p.tickets]
    used = [b["kv_transfer_params"]["remote_request_id"] for d in world.decode for b in d.bodies]
    assert len(set(tickets)) == 4, "one ticket each"
    assert sorted(used) == sorted(tickets)
    for instance in world.prefill + world.decode:
        assert all(body["n"] == 1 and isinstance(body["prompt"], str) for body in instance.bodies)
        assert len(instance.bodies) == 2, "spread over all instances"
    assert answer.json["id"] == f"cmpl-{answer.headers['x-request-id']}"
    await world.assert_idle()


async def test_batch_of_token_lists(world: World):
    await world.start()
    answer = await world.complete([[1, 2], [3]])
    assert [c["text"].split(" ")[0] for c in answer.json["choices"]] == ["<[1,", "<[3]"]


@pytest.mark.parametrize("usage", [True, False])
async def test_batch_and_n_streamed(world: World, usage: bool):
    await world.start()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer = await world.complete(["ab", "cde"], n=2, seed=10, stream=True, **options)
    chunks = answer.chunks
    texts = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["".join(words_of({"prompt": p, "seed": s})) for p in ("ab", "cde") for s in (10, 11)]
    assert len({chunk["id"] for chunk in chunks}) == 1
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert [u["total_tokens"] for u in usages] == ([17] if usage else [])
    assert not usage or chunks[-1]["choices"] == []
    await world.assert_idle()


@pytest.mark.parametrize("stream", [True, False])
async def test_chat_n(world: World, stream: bool):
    await world.start()
    answer = await world.chat(n=3, seed=1, stream=stream)
    if stream:
        contents = ["", "", ""]
        for choice in [choice for chunk in answer.chunks for choice in chunk["choices"]]:
            contents[choice["index"]] += choice["delta"].get("content", "")
    else:
        contents = [choice["message"]["content"] for choice in answer.json["choices"]]
    assert contents == ["".join(words_of({"seed": seed})) for seed in (1, 2, 3)]


async def test_requests_are_balanced(world: World):
    await world.start(prefill=2, decode=3)
    await asyncio.gather(*(world.complete(f"p{i}") for i in range(12)))
    for _ in range(6):
        await world.complete()
    assert [len(instance.bodies) for instance in world.prefill] == [9, 9]
    assert sum(len(instance.bodies) for instance in world.decode) == 18
    assert min(len(instance.bodies) for instance in world.decode) >= 5


async def test_models_come_from_a_decode_instance(world: World):
    await world.start(decode=2)
    async with world.session.get(world.url + "/v1/models") as response:
        assert response.status == 200
        assert (await response.json())["data"][0]["id"] == "tiny"
    for instance in world.decode:
        if instance.models:
            await instance.stop()
    async with world.session.get(world.url + "/v1/models") as response:
        assert response.status == 200, "the other one is asked"
    for instance in world.decode:
        await instance.stop()
    async with world.session.get(world.url + "/v1/models") as response:
        assert response.status == 503
        assert "cannot connect" in json.loads(await response.read())["error"]["message"]


async def test_metrics_count_by_outcome_leg_and_upstream(world: World):
    await world.start()
    await world.complete()
    await world.complete(n=0)
    p, d = world.prefill[0].url, world.decode[0].url
    await world.assert_counted('pdc_router_requests_total{outcome="ok",route="/v1/completions"}', 1)
    await world.assert_counted('pdc_router_requests_total{outcome="refused",route="/v1/completions"}', 1)
    assert await world.metric(f'pdc_router_leg_seconds_count{{leg="prefill",upstream="{p}"}}') == 1
    assert await world.metric(f'pdc_router_leg_seconds_count{{leg="decode",upstream="{d}"}}') == 1
    assert await world.metric(f'pdc_router_upstream_up{{leg="decode",upstream="{d}"}}') == 1
