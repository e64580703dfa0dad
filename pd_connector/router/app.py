"""The router's HTTP surface: routes, the key, health, metrics, and the server that runs them."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pd_connector.errors import ConfigError
from pd_connector.router.admission import Admission
from pd_connector.router.books import KEPT, Books
from pd_connector.router.broker import Broker
from pd_connector.router.faults import Fault, LegFailed, Refused
from pd_connector.router.means import Means
from pd_connector.router.metrics import RouterMetrics
from pd_connector.router.order import CHAT, COMPLETIONS
from pd_connector.router.relay import Relay, forwarded_headers
from pd_connector.router.settings import RouterSettings
from pd_connector.router.sse import error_body
from pd_connector.router.turns import Turns
from pd_connector.router.upstream import Fleet, Timeouts

_HEALTH_FRESH_S = 1.0
_MODELS_S = 10.0


class Router:
    """The state behind the routes."""

    def __init__(
        self,
        prefill: Sequence[str],
        decode: Sequence[str],
        broker: Broker,
        settings: RouterSettings,
        api_key: str | None,
    ) -> None:
        if api_key is not None and not api_key:
            raise ConfigError("the router's api_key is empty; set a key or leave it unset to serve without one")
        self.settings = settings
        self.metrics = RouterMetrics()
        self.fleet = Fleet(prefill, decode, settings, self.metrics)
        self._books = Books(self.metrics)
        turns = Turns(settings.turns, settings.turn_wait_s, broker, self.metrics)
        self._means = Means(self.fleet, settings, broker, self._books, turns)
        self._admission = Admission(settings.max_in_flight, self.metrics)
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._probing = asyncio.Lock()
        self._probed_at = float("-inf")
        self._health: dict[str, dict[str, str | None]] = {}

    async def generate(self, request: Request) -> ASGIApp:
        self._authorise(request)
        return Relay(request, self._means, self._admission)

    async def models(self, request: Request) -> Response:
        """The model list of a decode instance; the others are asked in turn when one fails."""
        self._authorise(request)
        headers = forwarded_headers(request)
        failed: set[str] = set()
        last = "no decode upstream was tried"
        while len(failed) <= self.settings.retries and (exchange := self.fleet.decode.begin(failed)) is not None:
            try:
                await exchange.ask("GET", "/v1/models", None, headers, Timeouts(total=_MODELS_S))
                return Response(await exchange.read(), media_type=exchange.content_type)
            except LegFailed as failure:
                failed.add(exchange.name)
                last = str(failure)
            except Refused as refusal:
                return Response(refusal.body, refusal.status, refusal.headers)
            finally:
                exchange.close()
        raise Fault(503, "service_unavailable", f"no decode instance told its models; the last: {last}")

    async def health(self, _: Request) -> Response:
        """200 while requests can be served: at least one live instance on each side."""
        async with self._probing:
            # Many callers share one round of probes, so that polling cannot become load on the instances.
            if time.monotonic() - self._probed_at > _HEALTH_FRESH_S:
                prefill, decode = await asyncio.gather(self.fleet.prefill.probe_all(), self.fleet.decode.probe_all())
                self._health = {"prefill": prefill, "decode": decode}
                self._probed_at = time.monotonic()
        report = {side: {name: why or "live" for name, why in found.items()} for side, found in self._health.items()}
        dead = [side for side, found in self._health.items() if None not in found.values()]
        if not dead:
            return JSONResponse({"status": "ok", **report})
        message = f"no live {' and no live '.join(dead)} instance; start one or correct its URL"
        return JSONResponse(error_body(message, "service_unavailable", 503) | {"status": "unavailable"} | report, 503)

    async def ledgers(self, request: Request) -> Response:
        """Where the time to the first token went, of the last ``n`` (default 100) choices; newest last."""
        self._authorise(request)
        count = request.query_params.get("n", "100")
        if not count.isdecimal() or len(count) > 5 or not 0 < int(count) <= KEPT:
            raise Fault(400, "invalid_request_error", f"n is a number from 1 to {KEPT}, not {count[:20]!r}")
        return JSONResponse(self._books.last(int(count)))

    async def prometheus(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            raise Fault(401, "authentication_error", "missing or wrong API key; send 'Authorization: Bearer <key>'")


def _on_fault(_: Request, error: Exception) -> Response:
    assert isinstance(error, Fault)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error_body(str(error), error.kind, error.status), error.status, headers)


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"no route {request.url.path!r} here",
        405: f"{request.method} is not allowed on {request.url.path!r}",
    }
    message = words.get(error.status_code, error.detail)
    body = error_body(message, "invalid_request_error", error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


def build_app(
    prefill: Sequence[str],
    decode: Sequence[str],
    *,
    broker: Broker,
    settings: RouterSettings | None = None,
    api_key: str | None = None,
) -> Starlette:
    """The router as an ASGI application.

    ``prefill`` and ``decode`` are base URLs such as ``http://10.0.0.1:8100``; ``broker`` ends leases of tickets that
    nobody used, and is told where the time went. With ``api_key`` every /v1 request, and /ledger, must carry it as a
    bearer token. Raises ConfigError for what cannot be used.
    """
    router = Router(prefill, decode, broker, settings or RouterSettings(), api_key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with router.fleet:
            yield

    return Starlette(
        routes=[
            Route(COMPLETIONS, router.generate, methods=["POST"]),
            Route(CHAT, router.generate, methods=["POST"]),
            Route("/v1/models", router.models, methods=["GET"]),
            Route("/health", router.health, methods=["GET"]),
            Route("/ledger", router.ledgers, methods=["GET"]),
            Route("/metrics", router.prometheus, methods=["GET"]),
        ],
        exception_handlers={Fault: _on_fault, HTTPException: _on_http},
        lifespan=lifespan,
    )


async def serve(
    prefill: Sequence[str],
    decode: Sequence[str],
    *,
    broker: Broker,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: RouterSettings | None = None,
    api_key: str | None = None,
    insecure: bool = False,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain; port 0 takes a free one, ``on_ready`` gets the port that was bound.

    Raises ConfigError for settings, URLs and addresses that cannot be used, among them a port in use and a non-loopback
    ``host`` with neither ``api_key`` nor ``insecure``.
    """
    if api_key is None and not insecure and not _is_loopback(host):
        raise ConfigError(
            f"the router will not listen on {host!r} without a key: anyone could use the instances behind it; "
            "set api_key, listen on 127.0.0.1, or say insecure=true"
        )
    settings = settings or RouterSettings()
    app = build_app(prefill, decode, broker=broker, settings=settings, api_key=api_key)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        log_level="warning",
        timeout_graceful_shutdown=settings.drain_s,
    )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"the router cannot listen on {host}:{port}: {error}; choose another host or port") from None
    if on_ready is not None:
        on_ready(int(listener.getsockname()[1]))
    await _Server(config).serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Returns from ``serve`` after a signal. uvicorn itself raises it again, and the caller could not clean up."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(
    prefill: Sequence[str],
    decode: Sequence[str],
    *,
    broker: Broker,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: RouterSettings | None = None,
    api_key: str | None = None,
    insecure: bool = False,
) -> None:
    """``serve`` in an event loop of its own."""
    asyncio.run(
        serve(
            prefill,
            decode,
            broker=broker,
            host=host,
            port=port,
            settings=settings,
            api_key=api_key,
            insecure=insecure,
        )
    )
