"""The ledgers of the last hand-overs, and the metrics made of all."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from pd_connector.router.ledger import Ledger
from pd_connector.router.metrics import RouterMetrics

KEPT = 1024
"""Ledgers that are kept to be looked at."""


class Books:
    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._last: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def enter(self, request_id: str, streamed_answer: bool, attributes: dict[str, str], ledger: Ledger) -> None:
        """One choice's."""
        for stage, seconds in ledger.stages.items():
            if seconds or stage not in ("retries", "turn"):
                self._metrics.stage_seconds.labels(stage).observe(seconds)
        self._metrics.stage_seconds.labels("unaccounted").observe(ledger.unaccounted)
        for kind, count in ledger.tokens.items():
            self._metrics.tokens.labels(kind).inc(count)
        about = {"request_id": request_id, "at": round(time.time(), 3), "stream": streamed_answer}
        self._last.append(about | attributes | ledger.plain())

    def last(self, count: int) -> list[dict[str, Any]]:
        """Newest last."""
        return list(self._last)[-count:]
