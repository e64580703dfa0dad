"""The instances behind the router: one side per leg, one exchange per HTTP request to one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from pd_connector.errors import ConfigError
from pd_connector.router.faults import LegFailed, Refused
from pd_connector.router.metrics import RouterMetrics
from pd_connector.router.policy import Balancer
from pd_connector.router.settings import RouterSettings

PROBE_S = 2.0
# vLLM's uvicorn closes an idle connection after 5 s; a request sent into that close would fail for no reason.
_KEEP_ALIVE_S = 4.0
_PASSED_ON = ("content-type", "retry-after", "www-authenticate")


def check_urls(leg: str, urls: Sequence[str]) -> list[str]:
    """Return base URLs without a trailing slash. Raises ConfigError naming the leg, the URL and the remedy."""
    if not urls:
        raise ConfigError(f"the router needs at least one {leg} upstream, such as http://127.0.0.1:8100")
    checked: list[str] = []
    for url in urls:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{leg} upstream {url!r} is malformed ({error}); write http://host:port") from None
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                f"a {leg} upstream at {parts.hostname!r} carries user or password in its URL; leave them out, "
                "the client's Authorization header is passed on"
            )
        usable = parts.scheme in ("http", "https") and parts.hostname and port != 0
        if not usable or parts.query or parts.fragment or any(c.isspace() for c in url):
            raise ConfigError(
                f"{leg} upstream {url!r} is not a base URL; write http://host:port without query or fragment"
            )
        base = url.rstrip("/")
        if base in checked:
            raise ConfigError(f"{leg} upstream {base!r} is listed twice; list each instance once")
        checked.append(base)
    return checked


class Side:
    """All upstreams that can serve one leg."""

    def __init__(self, leg: str, urls: Sequence[str], settings: RouterSettings, metrics: RouterMetrics) -> None:
        self.leg = leg
        self.settings = settings
        self.metrics = metrics
        self.balancer = Balancer(check_urls(leg, urls), settings.cooldown_s)
        self.session: aiohttp.ClientSession | None = None
        for name in self.balancer.names:
            metrics.upstream_in_flight.labels(leg, name).set_function(partial(self.balancer.in_flight, name))
            metrics.upstream_up.labels(leg, name).set_function(partial(self._is_up, name))

    def begin(self, exclude: Collection[str] = ()) -> Exchange | None:
        """Take the next upstream that is not excluded; None when there is none. The caller closes what it gets."""
        name = self.balancer.take(time.monotonic(), exclude)
        return None if name is None else Exchange(self, name)

    async def request(
        self, name: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: Timeouts
    ) -> aiohttp.ClientResponse:
        """Send one request and wait for the response's head. Raises LegFailed."""
        if self.session is None:
            raise RuntimeError("the router's lifespan has not started")
        timeout = aiohttp.ClientTimeout(
            total=timeout_s.total, connect=self.settings.connect_s, sock_read=timeout_s.silence
        )
        try:
            response = await self.session.request(
                method, name + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.failure(name, error) from error
        self.balancer.reachable(name)
        return response

    async def probe(self, name: str) -> str | None:
        """Ask one upstream for its health within PROBE_S; why it is not live, or None."""
        try:
            response = await self.request(name, "GET", "/health", None, {}, Timeouts(total=PROBE_S))
        except LegFailed as failure:
            return failure.reason
        response.close()
        return None if response.status == 200 else f"/health answered {response.status}"

    async def probe_all(self) -> dict[str, str | None]:
        reasons = await asyncio.gather(*(self.probe(name) for name in self.balancer.names))
        return dict(zip(self.balancer.names, reasons, strict=True))

    def _is_up(self, name: str) -> float:
        return 0.0 if self.balancer.is_aside(name, time.monotonic()) else 1.0

    def failure(self, name: str, error: Exception) -> LegFailed:
        """What an exception of the HTTP client means for the leg."""
        words = str(error) or type(error).__name__
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            self.balancer.unreachable(name, time.monotonic())
            return LegFailed(self.leg, name, f"cannot connect: {words}", status=503, connection=True)
        if isinstance(error, TimeoutError):
            return LegFailed(self.leg, name, f"no answer in time: {words}", status=504)
        broken = isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError))
        return LegFailed(self.leg, name, f"{'connection lost' if broken else 'bad answer'}: {words}", connection=broken)


class Timeouts:
    """Seconds for a whole exchange and for silence within it; None leaves that one to the caller's own deadline."""

    __slots__ = ("silence", "total")

    def __init__(self, total: float | None = None, silence: float | None = None) -> None:
        self.total = total
        self.silence = silence


class Exchange:
    """One HTTP request to one upstream, counted in flight there until ``close``."""

    def __init__(self, side: Side, name: str) -> None:
        self.side = side
        self.name = name
        self._response: aiohttp.ClientResponse | None = None
        self._closed = False

    async def ask(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeouts: Timeouts
    ) -> None:
        """Wait for a status of 200. Raises Refused on a 4xx and LegFailed on everything else."""
        response = await self.side.request(self.name, method, path, body, headers, timeouts)
        self._response = response
        if response.status == 200:
            return
        content = await self.read()
        if 400 <= response.status < 500:
            passed_on = {key: response.headers[key] for key in _PASSED_ON if key in response.headers}
            raise Refused(response.status, passed_on, content)
        words = content[:300].decode("utf-8", "replace")
        raise self.failed(f"answered {response.status}: {words}", 503 if response.status == 503 else 502)

    @property
    def content_type(self) -> str:
        return self._response.headers.get("content-type", "application/json") if self._response else "application/json"

    async def next_chunk(self) -> bytes:
        """The next bytes of the body as they arrive; b"" at its end. Raises LegFailed when the body breaks off."""
        assert self._response is not None, "ask first"
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.side.failure(self.name, error) from error

    async def read(self) -> bytes:
        """The whole body, bounded by ``max_response_bytes``. Raises LegFailed."""
        limit = self.side.settings.max_response_bytes
        content = bytearray()
        while chunk := await self.next_chunk():
            content += chunk
            if len(content) > limit:
                raise self.failed(f"its answer is longer than max_response_bytes ({limit})")
        return bytes(content)

    def failed(self, reason: str, status: int = 502) -> LegFailed:
        return LegFailed(self.side.leg, self.name, reason, status=status)

    def close(self) -> None:
        """End the exchange. An unfinished one loses its connection, by which vLLM notices and aborts its request."""
        if self._closed:
            return
        self._closed = True
        if self._response is not None:
            self._response.close()
        self.side.balancer.give_back(self.name)


class Fleet:
    """Both sides and the one HTTP session that they share while the router runs."""

    def __init__(
        self, prefill: Sequence[str], decode: Sequence[str], settings: RouterSettings, metrics: RouterMetrics
    ) -> None:
        self.prefill = Side("prefill", prefill, settings, metrics)
        self.decode = Side("decode", decode, settings, metrics)
        self.addresses: dict[str, str] = {}
        """Where the agents of prefill upstreams answer, by the tickets that they gave."""

    async def __aenter__(self) -> Fleet:
        # No connection limit: admission bounds the legs, and waiting for a connection would be a second, hidden queue.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        self.prefill.session = self.decode.session = session
        return self

    async def __aexit__(self, *_: Any) -> None:
        session, self.prefill.session, self.decode.session = self.prefill.session, None, None
        if session is not None:
            await session.close()
