"""One client request from first byte to last: admission, hand-overs, the answer, a client that may leave."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from pd_connector.router.admission import Admission, Slot
from pd_connector.router.conversations import Key, keys_of
from pd_connector.router.faults import Fault, LegFailed, Refused, bad_request
from pd_connector.router.legs import HandOver
from pd_connector.router.means import Means
from pd_connector.router.merge import StreamMerge, merge_plain
from pd_connector.router.order import Order, parse
from pd_connector.router.sse import EventSplitter, error_body, error_event
from pd_connector.runtime.clock import stamp

logger = logging.getLogger(__name__)

# Hop by hop, or true only of the client's own connection and body.
_NOT_FORWARDED = {"connection", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_NOT_FORWARDED |= {"accept-encoding", "content-encoding", "content-length"}
_NOT_FORWARDED |= {"proxy-authenticate", "proxy-authorization", "proxy-connection"}
# Cleaning up after a client that left takes the grace of its prefill leg and the releases; this is the backstop.
_CLEAN_UP_S = 10.0
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


class ClientGone(Exception):
    """The client closed its connection, or takes no bytes any more."""


def forwarded_headers(request: Request) -> dict[str, str]:
    """The request's end-to-end headers for an upstream; X-Request-Id is made up when the client sent no usable one."""
    named = {token.strip().lower() for token in request.headers.get("connection", "").split(",")}
    headers = {k: v for k, v in request.headers.items() if k not in _NOT_FORWARDED and k not in named}
    request_id = request.headers.get("x-request-id", "")
    headers["x-request-id"] = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
    headers["content-type"] = "application/json"
    # Bytes are passed on as they come, so they must come in the form the client gets.
    headers["accept-encoding"] = "identity"
    return headers


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the others and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


class Relay:
    """An ASGI application for exactly one request. Its call returns when both legs are closed and no ticket is held."""

    def __init__(self, request: Request, means: Means, admission: Admission) -> None:
        self._request = request
        self._path = request.url.path
        self._means = means
        self._settings = means.settings
        self._admission = admission
        self._headers = forwarded_headers(request)
        self._arrived = stamp()
        self._answered = False
        self._client_send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._client_send = send
        outcome = "ok"
        try:
            with Slot(self._admission) as slot:
                slot.grow_to(1)
                order = parse(self._path, await self._body(), self._settings.max_choices)
                slot.grow_to(len(order.choices))
                await self._while_connected(receive, self._serve(order))
        except Refused as refusal:
            outcome = "refused"
            await self._answer(refusal.status, refusal.headers, refusal.body)
        except orjson.JSONEncodeError as error:
            outcome = "refused"
            await self._report(bad_request(f"the request body cannot be passed on: {error}; it is nested too deeply"))
        except Fault as fault:
            outcome = "overloaded" if fault.retry_after_s else "refused" if fault.status < 500 else "failed"
            await self._report(fault)
        except LegFailed as failure:
            outcome = "broken"
            await self._break_off(failure)
        except (ClientGone, ClientDisconnect):
            outcome = "client_gone"
        except BaseException:
            outcome = "failed"
            raise
        finally:
            self._means.fleet.prefill.metrics.requests.labels(self._path, outcome).inc()

    async def _body(self) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = Fault(413, "invalid_request_error", f"the request body is longer than max_body_bytes ({limit})")
        length = self._request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_s):
                async for chunk in self._request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            message = f"the request body did not arrive within {self._settings.body_s:g} s"
            raise Fault(408, "invalid_request_error", message) from None
        return bytes(body)

    async def _while_connected(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work``; cancel it when the client leaves, wait for its clean-up and raise ClientGone."""

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task, gone = asyncio.create_task(work), asyncio.create_task(leave())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._answered:
                # The server reports a whole answer as a disconnect too: then the work is only closing its legs.
                await asyncio.wait({task}, timeout=_CLEAN_UP_S)
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_CLEAN_UP_S)
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    logger.debug("a request whose client had left ended with: %s", error)
                raise ClientGone
            task.result()
        finally:
            # On the router's own shutdown as well: tickets are released before this returns.
            gone.cancel()
            task.cancel()
            await asyncio.wait({task}, timeout=_CLEAN_UP_S)

    async def _serve(self, order: Order) -> None:
        keys = self._conversation(order)
        hands = [
            HandOver(choice, self._headers_of(k), self._means, keys, self._arrived)
            for k, choice in enumerate(order.choices)
        ]
        try:
            if len(hands) == 1:
                await self._serve_one(hands[0], order.stream)
            elif order.stream:
                await self._serve_merged_stream(hands, order.n)
            else:
                await together(hand.open() for hand in hands)
                body = merge_plain([hand.head for hand in hands], order.n)
                await self._start(200, self._told(hands) | {"content-length": str(len(body))})
                await self._send_body(body, more=False)
        finally:
            await asyncio.gather(*(hand.close() for hand in hands))

    def _conversation(self, order: Order) -> tuple[Key, ...]:
        """The turns that this may be the next one of. Answers of several choices are not continued."""
        if len(order.choices) > 1:
            return ()
        name = self._request.headers.get("x-pdc-conversation")
        whose = self._request.headers.get("authorization", "")
        return keys_of(name, whose, order.choices[0].body)

    def _headers_of(self, k: int) -> dict[str, str]:
        # The first keeps the client's id, which the merged answer then carries; the others must differ from it.
        return self._headers if k == 0 else self._headers | {"x-request-id": f"{self._headers['x-request-id']}-{k}"}

    async def _serve_one(self, hand: HandOver, stream: bool) -> None:
        await hand.open()
        if not stream:
            await self._start(200, self._told([hand]) | {"content-length": str(len(hand.head))})
            await self._send_body(hand.head, more=False)
            return
        await self._start(200, self._told([hand]))
        await self._send_body(hand.head)
        tail = hand.head[-16:]
        try:
            while chunk := await hand.next_chunk():
                tail = chunk[-16:] if len(chunk) >= 16 else (tail + chunk)[-16:]
                await self._send_body(chunk)
            if not tail.rstrip().endswith(b"[DONE]"):
                raise hand.broken("its stream ended without [DONE]")
        except LegFailed:
            if not tail.endswith((b"\n\n", b"\r\n\r\n")):
                await self._send_body(b"\n\n")
            raise
        await self._send_body(b"", more=False)

    async def _serve_merged_stream(self, hands: list[HandOver], n: int) -> None:
        await together(hand.open() for hand in hands)
        await self._start(200, self._told(hands))
        merge = StreamMerge(n)
        turn = asyncio.Lock()

        async def forward(k: int, hand: HandOver) -> None:
            splitter = EventSplitter(self._settings.max_response_bytes)
            chunk = hand.head
            while chunk:
                try:
                    events = [merge.rewrite(k, event) for event in splitter.feed(chunk)]
                except ValueError as error:
                    raise hand.broken(str(error)) from None
                async with turn:
                    await self._send_body(b"".join(event for event in events if event is not None))
                chunk = await hand.next_chunk()
            if not merge.is_done(k):
                raise hand.broken("its stream ended without [DONE]")

        await together(forward(k, hand) for k, hand in enumerate(hands))
        await self._send_body(merge.ending(), more=False)

    def _told(self, hands: list[HandOver]) -> dict[str, str]:
        """What the response says about its own way: type, stages in ms (of the choice that took longest), upstreams."""
        slowest = max((ledger for hand in hands if (ledger := hand.ledger())), key=lambda ledger: ledger.wall)
        stages = {**slowest.stages, "unaccounted": slowest.unaccounted}
        return {
            "content-type": hands[0].content_type,
            "server-timing": ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in stages.items()),
            "x-pdc-prefill": ", ".join(dict.fromkeys(hand.prefill_name for hand in hands)),
            "x-pdc-decode": ", ".join(dict.fromkeys(hand.decode_name for hand in hands)),
            "x-pdc-hand-over": ", ".join(dict.fromkeys(hand.way for hand in hands)),
        }

    async def _report(self, fault: Fault) -> None:
        headers = {"content-type": "application/json"}
        if fault.status >= 500 and not fault.retry_after_s:
            logger.warning("request %s: %s", self._headers["x-request-id"], fault)
        if fault.retry_after_s:
            headers["retry-after"] = str(fault.retry_after_s)
        if fault.status in (408, 413):
            headers["connection"] = "close"  # The rest of the body is not read.
        await self._answer(fault.status, headers, orjson.dumps(error_body(str(fault), fault.kind, fault.status)))

    async def _break_off(self, failure: LegFailed) -> None:
        """The status is sent, so the stream itself must say that it is not whole: an error event and no [DONE]."""
        logger.warning("request %s broke off: %s", self._headers["x-request-id"], failure)
        event = error_event(
            f"{failure} (after the first token; send the request again)", "upstream_error", failure.status
        )
        await self._end_quietly(self._send_body(event, more=False))

    async def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        async def both() -> None:
            await self._start(status, headers | {"content-length": str(len(body))})
            await self._send_body(body, more=False)

        await self._end_quietly(both())

    async def _end_quietly(self, sending: Coroutine[Any, Any, None]) -> None:
        try:
            await sending
        except ClientGone:
            logger.debug("request %s: the client left before its error", self._headers["x-request-id"])

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        told = headers | {"x-request-id": self._headers["x-request-id"]}
        encoded = [(key.encode("latin-1"), value.encode("latin-1", "replace")) for key, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _send_body(self, body: bytes, more: bool = True) -> None:
        self._answered = self._answered or not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._settings.client_stall_s):
                await self._client_send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None
