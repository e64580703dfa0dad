"""A real router (uvicorn in a thread) on real sockets, the instances of upstreams.py behind it, a client before it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import uvicorn

from pd_connector.protocol.messages import Account
from pd_connector.router import RouterSettings, build_app
from pd_connector.router.broker import OnSaved

from . import upstreams
from .upstreams import Instance


class RecordingBroker:
    """Remembers what was released; ``behave`` may delay or fail it. What instances tell is put into ``told``."""

    def __init__(self) -> None:
        self.address = ""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.open: set[bytes] = set()
        self.told: dict[bytes, list[Account]] = {}
        self.released: list[dict[str, Any]] = []
        self.renounced: list[tuple[str, bytes]] = []
        self.behave: Callable[[], Any] | None = None

    def address_for(self, url: str) -> str:
        return self.address

    def listen(self, on_saved: OnSaved) -> None:
        self.saved = on_saved

    def expect(self, of: bytes) -> None:
        self.open.add(of)
        self.loop = asyncio.get_running_loop()

    def accounts(self, of: bytes) -> list[Account]:
        assert of in self.open
        return self.told.get(of, [])

    def forget(self, of: bytes) -> None:
        self.open.discard(of)

    async def release(self, params: dict[str, Any]) -> None:
        self.released.append(params)
        if self.behave is not None:
            await self.behave()

    async def renounce(self, address: str, transfer: bytes) -> None:
        self.renounced.append((address, transfer))


@dataclass
class World:
    """One deployment under test."""

    prefill: list[Instance] = field(default_factory=list)
    decode: list[Instance] = field(default_factory=list)
    broker: RecordingBroker = field(default_factory=RecordingBroker)
    url: str = ""
    port: int = 0
    session: aiohttp.ClientSession = None  # type: ignore[assignment]
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None

    async def start(self, prefill: int = 1, decode: int = 1, api_key: str | None = None, **settings: Any) -> World:
        self.prefill = [Instance(upstreams.prefill) for _ in range(prefill)]
        self.decode = [Instance(upstreams.decode) for _ in range(decode)]
        for instance in self.prefill + self.decode:
            await instance.start()
        app = build_app(
            [instance.url for instance in self.prefill],
            [instance.url for instance in self.decode],
            broker=self.broker,
            settings=RouterSettings(**({"retry_pause_s": 0.01} | settings)),
            api_key=api_key,
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        await eventually(lambda: self.server is not None and self.server.started)
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))
        return self

    def server_call(self, function: Callable[[], None]) -> None:
        """On the router's own loop, as what its agent notes."""
        assert self.broker.loop is not None
        self.broker.loop.call_soon_threadsafe(function)

    async def stop(self) -> None:
        if self.session is not None:
            await self.session.close()
        if self.server is not None and self.thread is not None:
            self.server.should_exit = True
            await asyncio.to_thread(self.thread.join, 10)
            assert not self.thread.is_alive(), "the router did not stop"
        for instance in self.prefill + self.decode:
            await instance.stop()

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, headers=named) as response:
            return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read())

    async def complete(self, prompt: Any = "hello", **more: Any) -> Answer:
        return await self.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 3} | more)

    async def chat(self, **more: Any) -> Answer:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        return await self.post("/v1/chat/completions", body | more)

    async def send_and_keep(self, body: dict[str, Any], path: str = "/v1/completions") -> asyncio.StreamWriter:
        """Send a request on a connection of its own and leave the answer unread; closing the writer is leaving."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps({"model": "tiny", "prompt": "hello"} | body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        await writer.drain()
        return writer

    async def metric(self, line: str) -> float:
        """The value of one sample, written as Prometheus does: name{label="value",...}; 0 when it is not there."""
        async with self.session.get(self.url + "/metrics") as response:
            text = await response.text()
        for sample in text.splitlines():
            name, _, value = sample.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    async def assert_counted(self, line: str, value: float) -> None:
        """A request is counted when its legs are closed, which is after its client has the answer."""
        deadline = time.monotonic() + 5
        while (seen := await self.metric(line)) != value:
            assert time.monotonic() < deadline, f"{line} is {seen}, not {value}"
            await asyncio.sleep(0.02)

    async def assert_idle(self) -> None:
        """Nothing is under way any more, in the router or behind it."""
        await eventually(lambda: not any(instance.running for instance in self.prefill + self.decode))
        await self.assert_counted("pdc_router_in_flight", 0)
        for leg, instances in (("prefill", self.prefill), ("decode", self.decode)):
            for instance in instances:
                name = f'pdc_router_upstream_in_flight{{leg="{leg}",upstream="{instance.url}"}}'
                assert await self.metric(name) == 0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) >= {"message", "type", "code"}
        return error

    @property
    def events(self) -> list[str]:
        """The data of all events; fails on bytes that are none."""
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.content.decode().split("\n\n")
        assert parts.pop() == "", "the stream does not end at an event's end"
        return [part.removeprefix("data: ") for part in parts if part]

    @property
    def chunks(self) -> list[Any]:
        """The decoded events of a stream that ended well: one [DONE], at the end."""
        events = self.events
        assert events[-1] == "[DONE]"
        assert events.count("[DONE]") == 1
        return [json.loads(event) for event in events[:-1]]


async def eventually(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    try:
        yield world
    finally:
        await world.stop()
