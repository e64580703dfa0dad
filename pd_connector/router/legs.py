"""One choice's way through its two legs: a prompt to P, the ticket from P to D, the answer from D. Or, streamed: the
prompt to both at once, so that D reads P's blocks while they are computed.

A hand-over owns the ticket from the moment P names it until D's first token shows that D took the blocks. Whatever else
happens in between (client gone, D failed, D refused, a retry with a fresh ticket) the ticket is released at P, so that
its blocks never wait for a lease to run out while everybody is alive. Its capability is ours: so it can be released
even when P's answer with the ticket never arrives.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import orjson

from pd_connector.protocol.messages import CAPABILITY_BYTES
from pd_connector.protocol.params import (
    address_of,
    stream_params,
    transfer_params,
    with_prefix,
    with_report,
    with_save,
)
from pd_connector.router.conversations import Key
from pd_connector.router.faults import Fault, LegFailed, Refused
from pd_connector.router.ledger import Ledger, Legs, settle
from pd_connector.router.means import Means
from pd_connector.router.order import Choice
from pd_connector.router.policy import AGAIN, Mode, choose_mode
from pd_connector.router.sse import EventSplitter, data_of, error_of
from pd_connector.router.tracing import Trace
from pd_connector.router.upstream import Exchange, Side, Timeouts
from pd_connector.runtime.clock import clock_id, stamp

logger = logging.getLogger(__name__)

_RELEASE_S = 2.0


class _Attempts:
    """Which upstreams of a side one hand-over may still try."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._failed: set[str] = set()
        self._repeated = False
        self.pause_s = 0.0

    def begin(self) -> Exchange:
        exchange = self._side.begin(self._failed)
        assert exchange is not None, "asked for an attempt that may_retry did not allow"
        return exchange

    def may_retry(self, failure: LegFailed, same_again: bool) -> bool:
        """Another upstream if there is one; else, once, the same again where that can help."""
        self._failed.add(failure.upstream)
        self.pause_s = 0.0
        if len(self._failed) < len(self._side.balancer.names):
            return True
        if not same_again or self._repeated:
            return False
        self._repeated = True
        self._failed.discard(failure.upstream)
        self.pause_s = self._side.settings.retry_pause_s
        return True


class HandOver:
    """The state of one choice. ``open`` once, then ``head`` and ``next_chunk``; ``close`` always."""

    def __init__(
        self, choice: Choice, headers: Mapping[str, str], means: Means, keys: Sequence[Key], arrived: int
    ) -> None:
        self.head = b""
        self.prefill_name = self.decode_name = ""
        self._choice = choice
        self._trace = Trace(headers)
        self._settings, self._fleet, self._broker = means.settings, means.fleet, means.broker
        self._books, self._turns, self._keys = means.books, means.turns, keys
        self._prefix_sought = self._prefix_given = False
        self.legs = Legs(arrived, clock_id())
        self._metrics = means.fleet.prefill.metrics
        self._transfer = b""
        self._address: str | None = None
        self.mode: Mode | None = None
        self._stream_failed = False
        self._prefill = _Attempts(means.fleet.prefill)
        self._decode = _Attempts(means.fleet.decode)
        self._attempts = 1
        self._ticket: dict[str, Any] | None = None
        self._exchange: Exchange | None = None
        self._releases: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Run both legs until D's first token is in ``head`` (plain: D's whole answer).

        Raises Refused for an upstream's 4xx, Fault when attempts or time are used up.
        """
        try:
            async with asyncio.timeout(self._settings.first_token_s):
                while not await self._try():
                    pass
        except TimeoutError:
            leg, name = ("decode", self.decode_name) if self.decode_name else ("prefill", self.prefill_name)
            raise Fault(
                504,
                "timeout",
                f"no first token within {self._settings.first_token_s:g} s; the request was in its {leg} leg on {name} "
                f"(attempt {self._attempts}); raise first_token_s or add instances",
            ) from None

    def ledger(self) -> Ledger | None:
        """Where the time to the first token went, as far as the instances have told; None without one."""
        return settle(self.legs, self._broker.accounts(self._transfer)) if self.legs.first_token else None

    @property
    def way(self) -> str:
        """How the hand-over went, and why so."""
        if self.mode is None:
            return "none"
        return f"{'streamed' if self.mode.streamed else 'sequential'}: {self.mode.why}"

    async def next_chunk(self) -> bytes:
        """D's next bytes, unparsed; b"" at the end. Raises LegFailed."""
        assert self._exchange is not None, "open first"
        return await self._exchange.next_chunk()

    @property
    def content_type(self) -> str:
        assert self._exchange is not None, "open first"
        return self._exchange.content_type

    def broken(self, reason: str) -> LegFailed:
        return LegFailed("decode", self.decode_name, reason)

    async def close(self) -> None:
        """Close what is still open, release a ticket that D did not take, and wait for releases under way."""
        if self._exchange is not None:
            self._exchange.close()
        self._close_books()
        self._drop_ticket()
        if self._releases:
            await asyncio.wait(self._releases, timeout=2 * _RELEASE_S)  # Each ends itself before that.

    def _close_books(self) -> None:
        ledger = self.ledger()
        attributes = {"prefill": self.prefill_name, "decode": self.decode_name, "hand_over": self.way}
        if ledger is not None:
            self._books.enter(self._trace.headers["x-request-id"], self._choice.stream, attributes, ledger)
        self._trace.end(attributes, ledger)
        self._turns.end(self._transfer, done=ledger is not None)
        self._broker.forget(self._transfer)

    async def _try(self) -> bool:
        exchange = self._prefill.begin()
        self.prefill_name, self.decode_name = exchange.name, ""
        self._broker.forget(self._transfer)
        self._transfer = secrets.token_bytes(CAPABILITY_BYTES)
        self._broker.expect(self._transfer)
        self.legs.begin(stamp())
        self._address = self._fleet.addresses.get(exchange.name)
        self.mode = self._choose_mode(exchange)
        self.legs.streamed = self.mode.streamed
        self._metrics.hand_overs.labels("streamed" if self.mode.streamed else "sequential", self.mode.code).inc()
        if self.mode.streamed:
            return await self._both_at_once(exchange)
        return await self._one_after_the_other(exchange)

    def _choose_mode(self, prefill: Exchange) -> Mode:
        if self._stream_failed:
            return AGAIN
        tokens, others = self._choice.estimated_tokens(), self._fleet.prefill.balancer.in_flight(prefill.name) - 1
        settings = self._settings
        return choose_mode(tokens, settings.stream_min_tokens, self._address, others, settings.stream_max_queue)

    async def _both_at_once(self, exchange: Exchange) -> bool:
        """D answers when it has P's blocks, or, should P fail, has computed what it lacks. P's own answer only matters
        for what it says of P."""
        assert self._address is not None, "chosen only where it is known"
        prefill = asyncio.create_task(self._watch_prefill(exchange))
        done = False
        try:
            await self._decode_leg(stream_params(self._address, self._transfer))
            done = True
        except LegFailed as failure:
            self._stream_failed = True
            await self._prepare_retry(self._decode, failure, same_again=True)
        finally:
            if not done or not prefill.done():
                self._renounce()
            self._ticket = None
            prefill.cancel()
            await asyncio.wait({prefill}, timeout=1.0)
        return done

    async def _watch_prefill(self, exchange: Exchange) -> None:
        """P's leg of a streamed hand-over. When it fails, D must not wait for it."""
        started = time.monotonic()
        try:
            await self._ask_prefill(exchange)
            if self._ticket is not None and self._fleet.addresses.get(exchange.name) == self._address:
                self._metrics.leg_seconds.labels("prefill", exchange.name).observe(time.monotonic() - started)
                return
            logger.info("%s answered without a ticket, or from another address", exchange.name)
            self._metrics.ticketless.inc()
        except LegFailed as failure:
            self._metrics.leg_failures.labels(failure.leg, failure.upstream).inc()
            logger.info("%s while D reads along", failure)
        except Refused as refusal:
            logger.info("%s refused with %d while D reads along", exchange.name, refusal.status)
        self._renounce()

    async def _one_after_the_other(self, exchange: Exchange) -> bool:
        try:
            await self._prefill_leg(exchange)
        except LegFailed as failure:
            self._renounce()
            # What the last turn left may be gone, and P's policy to fail then: the next attempt has it compute.
            given, self._prefix_given = self._prefix_given, False
            await self._prepare_retry(self._prefill, failure, same_again=failure.connection or given)
            return False
        try:
            await self._decode_leg(self._ticket)
        except LegFailed as failure:
            # The ticket may be what D failed on (P restarted, lease over): with a fresh one the same D can succeed.
            held = self._ticket is not None
            self._drop_ticket()
            await self._prepare_retry(self._decode, failure, same_again=failure.connection or held)
            return False
        return True

    async def _prepare_retry(self, attempts: _Attempts, failure: LegFailed, same_again: bool) -> None:
        self._metrics.leg_failures.labels(failure.leg, failure.upstream).inc()
        if self._attempts > self._settings.retries or not attempts.may_retry(failure, same_again):
            raise failure.as_fault(self._attempts) from failure
        logger.info("%s; trying again", failure)
        self._attempts += 1
        self._metrics.retries.labels(failure.leg).inc()
        await asyncio.sleep(attempts.pause_s)

    async def _prefill_leg(self, exchange: Exchange) -> None:
        started = time.monotonic()
        leg = asyncio.create_task(self._ask_prefill(exchange))
        try:
            # Shielded: when the client leaves, P's answer is still read for a moment, for the ticket in it.
            await asyncio.shield(leg)
        except asyncio.CancelledError:
            await self._abandon(leg)
            self._renounce()
            raise
        self._metrics.leg_seconds.labels("prefill", exchange.name).observe(time.monotonic() - started)
        if self._ticket is None:
            self._metrics.ticketless.inc()

    async def _ask_prefill(self, exchange: Exchange) -> None:
        prefix: dict[str, Any] | None = None
        try:
            params = transfer_params(self._transfer, self.mode is not None and self.mode.streamed)
            if (prefix := await self._prefix()) is not None:
                params = with_prefix(params, prefix)
            body = self._choice.prefill_body(self._reported(params, exchange))
            timeouts = Timeouts(total=self._settings.prefill_s)
            self.legs.prefill_sent = stamp()
            await exchange.ask("POST", self._choice.path, body, self._trace.headers, timeouts)
            answer = _whole_answer(exchange, await exchange.read())
            self.legs.prefill_answered = stamp()
            ticket = answer.get("kv_transfer_params")
            if ticket is not None and not isinstance(ticket, dict):
                raise exchange.failed("its kv_transfer_params are neither an object nor null")
            self._ticket = ticket
            self._learn(exchange.name, ticket)
        except LegFailed as failure:
            if failure.connection:
                self._fleet.addresses.pop(exchange.name, None)
            raise
        finally:
            exchange.close()
            if prefix is not None:  # whatever became of it: it is used once
                self._begin_release(self._broker.release(prefix))

    def _for_decode(self, ticket: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
        params = self._reported(ticket, exchange)
        told = params is not ticket
        return with_save(params) if told and self._turns.begin(self._transfer, self._keys) else params

    async def _prefix(self) -> dict[str, Any] | None:
        """What the last turn left, for the first attempt."""
        if self._prefix_sought:
            return None
        self._prefix_sought = True
        self.legs.turn_sought = stamp()
        found = await self._turns.take(self._keys)
        self.legs.turn_found = stamp()
        self._prefix_given = found is not None
        return found

    def _reported(self, params: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
        """The instance is to tell us where the time went."""
        address = self._broker.address_for(exchange.name)
        return with_report(params, address, self._transfer) if address else params

    def _learn(self, upstream: str, ticket: dict[str, Any] | None) -> None:
        address = None if ticket is None else address_of(ticket)
        if address is None:
            self._fleet.addresses.pop(upstream, None)
        else:
            self._fleet.addresses[upstream] = address

    async def _abandon(self, leg: asyncio.Task[None]) -> None:
        try:
            await asyncio.wait({leg}, timeout=self._settings.abandon_grace_s)
        finally:
            leg.cancel()
        await asyncio.wait({leg}, timeout=1.0)
        if leg.done() and not leg.cancelled() and (error := leg.exception()) is not None:
            logger.debug("abandoned prefill leg ended with: %s", error)

    async def _decode_leg(self, ticket: dict[str, Any] | None) -> None:
        exchange = self._decode.begin()
        self.decode_name = exchange.name
        started = time.monotonic()
        try:
            body = self._choice.decode_body(ticket if ticket is None else self._for_decode(ticket, exchange))
            timeouts = Timeouts(silence=self._settings.decode_idle_s)
            self.legs.decode_sent = stamp()
            await exchange.ask("POST", self._choice.path, body, self._trace.headers, timeouts)
            if self._choice.stream:
                self.head = await _until_first_token(exchange, self._settings.max_response_bytes)
            else:
                self.head = await exchange.read()
                _whole_answer(exchange, self.head)
        except BaseException:
            exchange.close()
            self._turns.end(self._transfer, done=False)
            raise
        self._exchange = exchange
        self.legs.first_token = stamp()
        self._ticket = None  # D has the blocks: its first token was computed from them.
        self._metrics.leg_seconds.labels("decode", exchange.name).observe(time.monotonic() - started)

    def _drop_ticket(self) -> None:
        if self._ticket is None:
            return
        self._begin_release(self._broker.release(self._ticket))
        self._ticket = None

    def _renounce(self) -> None:
        """P may have leased blocks, or be about to, of which we hold no ticket."""
        if self._address is not None:
            self._begin_release(self._broker.renounce(self._address, self._transfer))

    def _begin_release(self, releasing: Coroutine[Any, Any, None]) -> None:
        release = asyncio.create_task(self._release(releasing))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    async def _release(self, releasing: Coroutine[Any, Any, None]) -> None:
        self._metrics.releases.inc()
        try:
            async with asyncio.timeout(_RELEASE_S):
                await releasing
        except Exception as error:
            self._metrics.release_failures.inc()
            logger.warning("releasing a ticket of %s failed: %s", self.prefill_name, error or type(error).__name__)


async def _until_first_token(exchange: Exchange, limit: int) -> bytes:
    """Read D's stream up to the first event that proves a token; return all bytes so far, unchanged."""
    splitter = EventSplitter(limit)
    held = bytearray()
    while chunk := await exchange.next_chunk():
        held += chunk
        try:
            events = splitter.feed(chunk)
        except ValueError as error:
            raise exchange.failed(str(error)) from None
        for event in events:
            if (data := data_of(event)) is not None and not _is_preamble(_answer(exchange, data)):
                return bytes(held)
        if len(held) > limit:
            raise exchange.failed(f"more than {limit} bytes came before its first token")
    raise exchange.failed("its stream ended before the first token" if held else "it answered 200 with an empty body")


def _is_preamble(event: dict[str, Any]) -> bool:
    """vLLM streams a chat's role before it looks whether the request failed, so a role alone proves no token."""
    for choice in event["choices"]:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason"):
            return False
        if any(value for key, value in delta.items() if key != "role"):
            return False
    return True


def _whole_answer(exchange: Exchange, content: bytes) -> dict[str, Any]:
    """Like ``_answer``, for one that must have its choices in it."""
    answer = _answer(exchange, content)
    if not answer["choices"] or not all(isinstance(choice, dict) for choice in answer["choices"]):
        raise exchange.failed("it answered 200 without choices")
    return answer


def _answer(exchange: Exchange, content: bytes) -> dict[str, Any]:
    """Decode an answer or an event. Raises LegFailed when it is none or an error, Refused when it is a 4xx error."""
    if not content.strip():
        raise exchange.failed("it answered 200 with an empty body")
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise exchange.failed(f"it answered 200 with malformed JSON: {content[:100]!r}") from None
    if (error := error_of(answer)) is not None:
        code = error.get("code")
        if isinstance(code, int) and 400 <= code < 500:
            raise Refused(code, {"content-type": "application/json"}, orjson.dumps({"error": error}))
        raise exchange.failed(f"it answered 200 with an error: {error.get('message')}", 503 if code == 503 else 502)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise exchange.failed("it answered 200 without choices")
    return answer
