"""``pdc ledger``: where the time to the first token went, as a table, as JSON or as a picture."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pd_connector.errors import ConfigError
from pd_connector.figure import load_pyplot, save_figure
from pd_connector.router.ledger import STAGES

_SECONDS = 10.0
_MOST_BYTES = 64 << 20
_COLUMNS = (*STAGES, "unaccounted")


class _Row(msgspec.Struct):
    """What a ledger must have in it, to be shown."""

    request_id: str
    hand_over: str
    ttft_ms: float
    stages_ms: dict[str, float]
    unaccounted_ms: float
    tokens: dict[str, int]
    missing: list[str]


def fetch(url: str, count: int, api_key: str | None) -> list[dict[str, Any]]:
    """The router's last ledgers, newest last. Raises ConfigError."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/ledger?n={count}", headers=headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            found = response.read(_MOST_BYTES)
        msgspec.json.decode(found, type=list[_Row])
        return list(json.loads(found))
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} answered {error.code}: {error.read(500).decode('utf-8', 'replace')}") from None
    except (OSError, ValueError, HTTPException, RecursionError) as error:
        why = f"{type(error).__name__} {error}".strip()
        raise ConfigError(f"no ledger from {url}: {why}; give the address of a pdc router") from None


def table(ledgers: Sequence[Mapping[str, Any]]) -> Table:
    """One line per choice, and their medians."""
    out = Table(title="time to first token, ms", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for head in (
        "request",
        "loaded/\nexpected",
        "all",
        *(column.replace("_", "\n") for column in _COLUMNS),
        "hand-over",
    ):
        out.add_column(head, justify="left" if head in ("request", "hand-over") else "right")
    for ledger in ledgers:
        tokens = ledger["tokens"]
        told = f"{tokens.get('loaded')}/{tokens.get('expected')}" if "decode" not in ledger["missing"] else "?"
        values = (_ms(value) for value in _values(ledger))
        way = ledger["hand_over"].partition(":")[0] + "".join(f", {side} untold" for side in ledger["missing"])
        out.add_row(ledger["request_id"][:12], told, *values, way)
    if len(ledgers) > 1:
        middle = [_ms(median(column)) for column in zip(*(_values(ledger) for ledger in ledgers), strict=True)]
        out.add_row("median", "", *middle, "", style="bold")
    return out


def plot(ledgers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar per choice, made of its stages. Raises ConfigError."""
    figure, axis = load_pyplot().subplots(figsize=(max(6.0, 0.12 * len(ledgers) + 4), 4.5))
    floor = [0.0] * len(ledgers)
    for number, column in enumerate(_COLUMNS):
        heights = [_values(ledger)[1 + number] for ledger in ledgers]
        colour = "black" if column == "unaccounted" else f"C{number}"
        axis.bar(range(len(ledgers)), heights, bottom=floor, width=0.9, label=column, color=colour)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axis.set_xlabel("choices, newest last")
    axis.set_ylabel("time to first token, ms")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def _values(ledger: Mapping[str, Any]) -> list[float]:
    stages = ledger["stages_ms"]
    return [ledger["ttft_ms"], *(stages.get(stage, 0.0) for stage in STAGES), ledger["unaccounted_ms"]]


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
