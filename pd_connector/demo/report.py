"""The demo's results: tables for people, one JSON object for programs, lines while one waits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pd_connector.demo.verdict import STAGES, Row

_LINE_S = 10.0
"""Without a terminal, how often a wait says that it still waits."""

_HEADS = {
    "first_token": "first\ntoken",
    "p_queue": "P\nqueue",
    "d_queue": "D\nqueue",
    "prefill": "pre-\nfill",
    "announce": "an-\nnounce",
    "commit": "com-\nmit",
    "unaccounted": "un-\nknown",
}


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
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._next = time.monotonic() + _LINE_S

    def waiting(self, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(escape(text[: self._console.width - 4]))
        elif time.monotonic() >= self._next:
            self.step(text)

    def close(self) -> None:
        self._status.stop()


def proof(rows: Sequence[Row]) -> Table:
    """Did D answer right, and from P's bytes?"""
    out = _table("proof", ("prompt", "tokens", "digests", "KV bytes", "recomputed", "over"))
    for row in rows:
        cells = (_tokens(row), _digests(row), f"{row.kv_bytes:,}", str(row.recomputed_tokens), row.transport)
        out.add_row(str(row.prompt_tokens), *cells, style="red" if row.complaints() else None)
    return out


def times(rows: Sequence[Row]) -> Table:
    """The ledger: its stages add up to the TTFT through P and D."""
    heads = [_HEADS.get(stage, stage) for stage in STAGES]
    out = _table("time to first token, ms", ("prompt", "plain\non P", "via\nP/D", *heads))
    for row in rows:
        values = (row.plain_ttft_ms, sum(row.ttft_ms.values()), *(row.ttft_ms[stage] for stage in STAGES))
        out.add_row(str(row.prompt_tokens), *(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values))
    return out


def _table(title: str, heads: Sequence[str]) -> Table:
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for head in heads:
        out.add_column(head, justify="right", no_wrap=True)
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
