"""What the router refuses, its key, its health, and how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys

import aiohttp
import pytest

from pd_connector.errors import ConfigError
from pd_connector.router import build_app, serve

from . import upstreams
from .conftest import RecordingBroker, World, eventually


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN}'])
async def test_a_malformed_body_is_a_400(world: World, body: bytes):
    await world.start()
    answer = await world.post("/v1/completions", body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert not world.prefill[0].bodies


async def test_best_of_is_refused(world: World):
    await world.start()
    answer = await world.complete(best_of=4)
    assert answer.status == 400
    assert "best_of" in answer.error["message"]


async def test_too_many_choices_are_refused(world: World):
    await world.start()
    answer = await world.complete(["p"] * 65, n=2)
    assert answer.status == 400
    assert "128" in answer.error["message"]
    assert not world.prefill[0].bodies


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_too_large_is_a_413(world: World, announced: bool):
    await world.start(max_body_bytes=100_000)
    data = json.dumps({"prompt": "x" * 200_000}).encode()

    async def pieces():
        for start in range(0, len(data), 10_000):
            yield data[start : start + 10_000]

    try:
        async with world.session.post(world.url + "/v1/completions", data=data if announced else pieces()) as response:
            assert response.status == 413
            assert "max_body_bytes" in (await response.json())["error"]["message"]
    except aiohttp.ClientConnectionError:
        assert not announced, "the connection may close under a client that is still sending"
    assert not world.prefill[0].bodies
    assert (await world.complete("x" * 1000)).status == 200


async def test_a_body_that_never_ends_is_a_408(world: World):
    await world.start(body_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    async with asyncio.timeout(5):
        assert (await reader.readline()).split()[1] == b"408"
    writer.close()
    await world.assert_idle()


async def test_admission_is_bounded_and_counts_choices(world: World):
    await world.start(max_in_flight=4, max_choices=4)
    world.decode[0].act = upstreams.hang
    writers = [await world.send_and_keep({"n": 3})]
    await eventually(lambda: world.decode[0].running == 3)
    answer = await world.complete(n=2)
    assert answer.status == 503
    assert answer.error["type"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1
    writers.append(await world.send_and_keep({}))
    await eventually(lambda: world.decode[0].running == 4)
    assert (await world.complete()).status == 503
    assert await world.metric("pdc_router_in_flight") == 4
    await world.assert_counted('pdc_router_requests_total{outcome="overloaded",route="/v1/completions"}', 2)
    world.decode[0].act = upstreams.decode
    for writer in writers:
        writer.close()
    await world.assert_idle()
    assert (await world.complete(n=4)).status == 200


async def test_unknown_routes_and_methods(world: World):
    await world.start()
    answer = await world.post("/v1/embeddings", {})
    assert (answer.status, answer.error["code"]) == (404, 404)
    assert "/v1/embeddings" in answer.error["message"]
    async with world.session.get(world.url + "/v1/completions") as response:
        assert response.status == 405
        assert response.headers["allow"] == "POST"
        assert "GET" in (await response.json())["error"]["message"]


async def test_the_key_guards_the_api_but_not_health_and_metrics(world: World):
    await world.start(api_key="k3y")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "k3y"}):
        answer = await world.post("/v1/completions", {"prompt": "p"}, **headers)
        assert answer.status == 401
        assert answer.error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        async with world.session.get(world.url + "/v1/models", headers=headers) as response:
            assert response.status == 401
    assert not world.prefill[0].bodies
    assert (await world.post("/v1/completions", {"prompt": "p"}, Authorization="Bearer k3y")).status == 200
    for path in ("/health", "/metrics"):
        async with world.session.get(world.url + path) as response:
            assert response.status == 200


async def test_health_needs_one_live_instance_on_each_side(world: World):
    await world.start(prefill=2, decode=1)

    async def health() -> tuple[int, dict]:
        async with world.session.get(world.url + "/health") as response:
            return response.status, await response.json()

    p, q, d = world.prefill[0].url, world.prefill[1].url, world.decode[0].url
    assert await health() == (200, {"status": "ok", "prefill": {p: "live", q: "live"}, "decode": {d: "live"}})
    await world.prefill[0].stop()
    await asyncio.sleep(1.1)
    code, report = await health()
    assert code == 200
    assert "cannot connect" in report["prefill"][p]
    await world.decode[0].stop()
    await asyncio.sleep(1.1)
    code, report = await health()
    assert code == 503
    assert "no live decode instance" in report["error"]["message"]
    assert report["prefill"][q] == "live"
    await world.decode[0].start()
    await asyncio.sleep(1.1)
    assert (await health())[0] == 200


def test_the_app_refuses_what_it_cannot_use():
    for prefill, decode, key in (
        ([], ["http://h:1"], None),
        (["h:1"], ["http://h:1"], None),
        (["http://h"], ["http://d"], ""),
    ):
        with pytest.raises(ConfigError):
            build_app(prefill, decode, broker=RecordingBroker(), api_key=key)


async def test_serve_refuses_an_open_door_and_a_taken_port():
    with pytest.raises(ConfigError, match="without a key"):
        await serve(["http://127.0.0.1:1"], ["http://127.0.0.1:2"], broker=RecordingBroker(), host="0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(["http://127.0.0.1:1"], ["http://127.0.0.1:2"], broker=RecordingBroker(), port=port)


SERVER = """
import asyncio, sys
from pd_connector.router import serve

class Broker:
    def address_for(self, url):
        return ""

    def listen(self, on_saved):
        pass

    def expect(self, of):
        pass

    def accounts(self, of):
        return []

    def forget(self, of):
        pass

    async def release(self, params):
        print("released", params["remote_engine_id"], flush=True)

def ready(port):
    print("port", port, flush=True)

asyncio.run(serve([sys.argv[1]], [sys.argv[2]], broker=Broker(), port=0, on_ready=ready))
"""


@pytest.mark.parametrize("drains", [True, False])
async def test_a_router_process_serves_and_ends_on_sigterm(world: World, drains: bool):
    await world.start()
    world.decode[0].act = upstreams.slow(1.0, upstreams.decode) if drains else upstreams.decode
    urls = (world.prefill[0].url, world.decode[0].url)
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, *urls, stdout=asyncio.subprocess.PIPE, env=env
    )
    try:
        async with asyncio.timeout(30):
            assert process.stdout is not None
            port = int((await process.stdout.readline()).split()[1])
            request = asyncio.create_task(
                world.session.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "hello"})
            )
            if drains:
                await eventually(lambda: world.decode[0].running)
                process.send_signal(signal.SIGTERM)
            response = await request
            assert response.status == 200
            assert (await response.json())["choices"][0]["text"].endswith("end>")
            if not drains:
                process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, "serve returned, so that its caller could clean up"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
