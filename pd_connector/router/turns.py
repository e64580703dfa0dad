"""Turns of conversations: what decode instances keep of them, and the prefills that read it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.params import to_params
from pd_connector.protocol.ticket import Ticket
from pd_connector.router.broker import Broker
from pd_connector.router.conversations import Conversations, Kept, Key
from pd_connector.router.metrics import RouterMetrics

logger = logging.getLogger(__name__)


class Turns:
    """``most`` conversations are remembered, none with 0. A turn that follows at once waits ``patience_s`` for what the
    last one leaves: that is told when it was copied, a moment after its last token."""

    def __init__(self, most: int, patience_s: float, broker: Broker, metrics: RouterMetrics) -> None:
        self._most, self._patience_s, self._broker, self._metrics = most, patience_s, broker, metrics
        self._conversations = Conversations(most)
        self._waiting: set[asyncio.Future[None]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        broker.listen(self._told)

    def __len__(self) -> int:
        return len(self._conversations)

    def begin(self, of: bytes, keys: Sequence[Key]) -> bool:
        """Whether the decode instance of this request is to keep it."""
        if not keys or not self._most:
            return False
        self._conversations.begin(of, keys[0])
        return True

    def end(self, of: bytes, done: bool) -> None:
        if done:
            self._conversations.end(of, time.monotonic() + self._patience_s)
        else:
            self._conversations.forget(of)

    async def take(self, keys: Sequence[Key]) -> dict[str, Any] | None:
        """The ticket of a request's prefix, as parameters; it is the caller's to release."""
        if not keys or not self._most:
            return None
        deadline = time.monotonic() + self._patience_s
        while (now := time.monotonic()) < deadline and self._conversations.is_awaited(keys, now):
            told = asyncio.get_running_loop().create_future()
            self._waiting.add(told)
            try:
                await asyncio.wait({told}, timeout=deadline - now)
            finally:
                self._waiting.discard(told)
        ticket = self._conversations.take(keys, now)
        params = None if ticket is None else _params_of(ticket)
        if params is not None:
            self._metrics.turns.labels("read").inc()
        return params

    def _told(self, of: bytes, ticket: bytes, seconds: float, reason: str) -> None:
        """By whoever claims to be a decode instance."""
        self._metrics.turns.labels("kept" if ticket else "not_kept").inc()
        if not ticket:
            logger.debug("a decode instance kept nothing of a turn: %s", reason)
        kept = Kept(ticket, time.monotonic() + seconds) if ticket else None
        for gone in self._conversations.told(of, kept):
            self._metrics.turns.labels("dropped").inc()
            if (params := _params_of(gone.ticket)) is not None:
                release = asyncio.get_running_loop().create_task(self._broker.release(params))
                self._releases.add(release)
                release.add_done_callback(self._releases.discard)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)


def _params_of(ticket: bytes) -> dict[str, Any] | None:
    try:
        return to_params(Ticket.from_bytes(ticket), request_id="", engine_id="", tp_size=1, pp_size=1)
    except RemoteProtocolError as error:
        logger.warning("an instance kept a turn under a ticket that is none: %s", error)
        return None
