"""Turns of conversations: what decode instances keep of them, and the prefills that read it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

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
        """The ticket of a request's prefix; it is the caller's to release."""
        if not keys or not self._most:
            return None
        while self._conversations.is_awaited(keys, now := time.monotonic()):
            told = asyncio.get_running_loop().create_future()
            self._waiting.add(told)
            await asyncio.wait({told}, timeout=self._patience_s)
            self._waiting.discard(told)
        kept = self._conversations.take(keys, now)
        if kept is None:
            return None
        self._metrics.turns.labels("read").inc()
        return kept.ticket

    def _told(self, of: bytes, ticket: dict[str, Any] | None, seconds: float, reason: str) -> None:
        """By a decode instance."""
        self._metrics.turns.labels("kept" if ticket is not None else "not_kept").inc()
        if ticket is None:
            logger.debug("a decode instance kept nothing of a turn: %s", reason)
        kept = None if ticket is None else Kept(ticket, time.monotonic() + seconds)
        for gone in self._conversations.told(of, kept):
            self._metrics.turns.labels("dropped").inc()
            release = asyncio.get_running_loop().create_task(self._broker.release(gone.ticket))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
