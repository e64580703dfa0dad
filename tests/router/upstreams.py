"""A small HTTP server that speaks as a vLLM instance does on the wire, and fails where a test's script says so."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Body = dict[str, Any]
Act = Callable[["Instance", web.Request, Body], Awaitable[web.StreamResponse]]


class Instance:
    """Serves on a loopback port of its own. ``script`` has one act per coming request; after it ``act`` serves all."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.script: deque[Act] = deque()
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.tickets: list[Body] = []
        self.models = 0
        self.aborted = 0
        self.running = 0
        self.arrived = asyncio.Event()
        self.answered = asyncio.Event()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)  # The same port again after a stop.
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        self.models += 1
        return web.json_response({"object": "list", "data": [{"id": "tiny", "served_by": self.port}]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({key.lower(): value for key, value in request.headers.items()})
        self.arrived.set()
        self.running += 1
        try:
            act = self.script.popleft() if self.script else self.act
            return await act(self, request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            self.answered.set()


def is_chat(request: web.Request) -> bool:
    return request.path.endswith("/chat/completions")


def base(request: web.Request, chunk: bool = False) -> Body:
    prefix, kind = ("chatcmpl", "chat.completion") if is_chat(request) else ("cmpl", "text_completion")
    if chunk and is_chat(request):
        kind += ".chunk"
    return {"id": f"{prefix}-{request.headers['X-Request-Id']}", "object": kind, "created": 1, "model": "tiny"}


def words_of(body: Body) -> list[str]:
    """What D decodes: it shows the prompt and the seed, so that a test sees which choice it belongs to."""
    prompt = body.get("prompt", "chat")
    return [f"<{json.dumps(prompt)}", f" seed={body.get('seed')}", " end>"]


def usage_of(body: Body) -> Body:
    prompt = body.get("prompt", "chat")
    tokens = len(prompt)
    return {
        "prompt_tokens": tokens,
        "completion_tokens": 3,
        "total_tokens": tokens + 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


# --- acts of a prefill instance


async def prefill(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    ticket = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": f"engine-{instance.port}",
        "remote_request_id": request.headers["X-Request-Id"],
        "remote_block_ids": [len(instance.tickets)],
        "remote_host": "127.0.0.1",
        "remote_port": instance.port,
    }
    instance.tickets.append(ticket)
    answer = base(request) | {"choices": [{"index": 0, "text": "x"}], "kv_transfer_params": ticket}
    return web.json_response(answer)


async def prefill_without_ticket(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    return web.json_response(base(request) | {"choices": [{"index": 0, "text": "x"}], "kv_transfer_params": None})


def slow(seconds: float, then: Act) -> Act:
    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await then(instance, request, body)

    return act


def after(first: Instance, then: Act) -> Act:
    """``then`` once ``first`` has answered something and is at rest: of two legs at once, this one ends last."""

    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        await first.answered.wait()
        await asyncio.sleep(0.1)  # on its way to the router
        return await then(instance, request, body)

    return act


# --- acts of a decode instance


async def decode(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    if not body.get("stream"):
        return web.json_response(_plain(request, body))
    response = await open_stream(request)
    for chunk in chunks_of(request, body):
        await send_event(response, chunk)
    await response.write(b"data: [DONE]\n\n")
    return response


def _plain(request: web.Request, body: Body) -> Body:
    text = "".join(words_of(body))
    choice = {"message": {"role": "assistant", "content": text}} if is_chat(request) else {"text": text}
    choice |= {"index": 0, "finish_reason": "length"}
    return base(request) | {"choices": [choice], "usage": usage_of(body), "kv_transfer_params": None}


def chunks_of(request: web.Request, body: Body) -> list[Body]:
    head = base(request, chunk=True)
    chunks = []
    if is_chat(request):
        chunks.append(head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for word in words_of(body):
        piece = {"delta": {"content": word}} if is_chat(request) else {"text": word}
        chunks.append(head | {"choices": [piece | {"index": 0, "finish_reason": None}]})
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(head | {"choices": [], "usage": usage_of(body)})
    return chunks


async def open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def send_event(response: web.StreamResponse, document: Body) -> None:
    await response.write(b"data: " + json.dumps(document).encode() + b"\n\n")


async def decode_and_stall(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    """Its first token, then nothing."""
    response = await open_stream(request)
    for chunk in chunks_of(request, body)[:2]:
        await send_event(response, chunk)
    await asyncio.sleep(30)
    return response


async def decode_and_drop(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    """Its first token, half of an event, and the connection is gone: a process that was killed."""
    response = await open_stream(request)
    for chunk in chunks_of(request, body)[:2]:
        await send_event(response, chunk)
    await response.write(b'data: {"id": "half an')
    await asyncio.sleep(0.05)
    assert request.transport is not None
    request.transport.abort()
    return response


async def decode_without_done(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    response = await open_stream(request)
    for chunk in chunks_of(request, body):
        await send_event(response, chunk)
    return response


async def decode_with_late_error(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    response = await open_stream(request)
    for chunk in chunks_of(request, body)[:2]:
        await send_event(response, chunk)
    await send_event(response, {"error": {"message": "engine died midway", "type": "x", "code": 500}})
    await response.write(b"data: [DONE]\n\n")
    return response


def error_event(code: int) -> Act:
    """A failed load as vLLM streams it: status 200, for chat the role first, then an error event and [DONE]."""

    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        response = await open_stream(request)
        if is_chat(request):
            await send_event(response, chunks_of(request, body)[0])
        error = {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": code}
        await send_event(response, {"error": error})
        await response.write(b"data: [DONE]\n\n")
        return response

    return act


# --- acts of either


def status(code: int, body: Body | None = None) -> Act:
    async def act(instance: Instance, request: web.Request, _: Body) -> web.StreamResponse:
        return web.json_response(body or {"error": {"message": f"scripted {code}", "code": code}}, status=code)

    return act


def raw(content: bytes, content_type: str = "application/json") -> Act:
    """A status of 200 with these bytes."""

    async def act(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        return web.Response(body=content, content_type=content_type)

    return act


async def drop(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    """The connection breaks before a byte of the answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hang(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response(status=500)
