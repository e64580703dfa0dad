"""The demo's results: a table for people, one JSON object for programs, lines while one waits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pd_connector.demo.verdict import STAGES, Row

_LINE_S = 10.0
"""Without a terminal, how often a wait says that it still waits."""

_WORDS = {"d_first_token": "D first token", "p_queue": "P queue", "hand_off": "hand-off"}


class Progress:
    """What is going on: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._next = 0.0
        if console.is_terminal:
            self._status.start()

    def step(self, text: str) -> None:
        """A thing done, or begun."""
        self._console.print(text, markup=False, highlight=False)
        self._next = time.monotonic() + _LINE_S

    def waiting(self, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(escape(text[: self._console.width - 4]))
        elif time.monotonic() >= self._next:
            self.step(text)

    def close(self) -> None:
        self._status.stop()


def table(rows: Sequence[Row]) -> Table:
    """Times in ms. The stages of the ledger add up to the TTFT through P/D."""
    out = Table(title="prefill on P, decode on D", title_justify="left")
    heads = ("prompt", "tokens", "digests", "KV bytes", "recomputed", "over", "plain TTFT", "TTFT")
    for head in (*heads, *(_WORDS.get(stage, stage) for stage in STAGES)):
        out.add_column(head, justify="right")
    for row in rows:
        cells = [str(row.prompt_tokens), _tokens(row), _digests(row), f"{row.kv_bytes:,}", str(row.recomputed_tokens)]
        cells += [row.transport, f"{row.plain_ttft_ms:.1f}", f"{sum(row.ttft_ms.values()):.1f}"]
        cells += [f"{row.ttft_ms[stage]:.1f}" for stage in STAGES]
        out.add_row(*cells, style="red" if row.complaints() else None)
    return out


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps({"verdict": verdict(rows), "prompts": [row.plain() for row in rows]})


def verdict(rows: Sequence[Row]) -> str:
    return "fail" if any(row.complaints() for row in rows) or not rows else "pass"


def _tokens(row: Row) -> str:
    if row.mismatch is None:
        return "equal"
    kind = "tie" if row.mismatch.is_tie else "DIFFER"
    return f"{kind} at {row.mismatch.position}, margin {row.mismatch.margin:.3g}"


def _digests(row: Row) -> str:
    if row.digests_equal is None:
        return "nothing to move"
    return f"{row.digests_compared} equal" if row.digests_equal else "DIFFER"
