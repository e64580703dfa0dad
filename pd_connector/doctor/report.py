"""The report: checks and transports, as a table for people or one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class State(StrEnum):
    OK = "ok"
    WARN = "warn"  # it works, but not as well or as safely as it could
    FAIL = "fail"


class Use(StrEnum):
    CHOSEN = "chosen"
    USABLE = "usable"
    UNUSABLE = "unusable"  # not for this pair of agents; another transport serves it
    FAILED = "failed"  # it said that it reaches the peer, and then did not


class Row(msgspec.Struct, frozen=True):
    """One check. ``remedy`` is what to do when the state is not ok."""

    name: str
    state: State
    found: str
    remedy: str = ""


class TransportRow(msgspec.Struct, frozen=True):
    """One transport to the memory of one agent. ``reason`` says why it is not chosen, or what failed; ``connect_ms`` is
    the time to connect, ``gbps`` 10**9 bytes per second of scattered blocks, ``latency_us`` the median of one small
    read; None where it was not measured."""

    agent: str
    transport: str
    state: Use
    reason: str = ""
    connect_ms: float | None = None
    gbps: float | None = None
    latency_us: float | None = None


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    transports: list[TransportRow] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(row.state is State.FAIL for row in self.rows)

    def as_json(self) -> str:
        return msgspec.json.encode(self).decode()

    def as_text(self) -> str:
        heads = ("check", "state", "found")
        lines = lines_of(heads, [(row.name, row.state, row.found) for row in self.rows])
        # Under its row, so that what is wrong and what to do about it are read together.
        indent = " " * lines[0].index(heads[2])
        for at, row in reversed(list(enumerate(self.rows, 1))):
            if row.remedy:
                lines.insert(at + 1, f"{indent}-> {row.remedy}")
        if self.transports:
            lines += ["", *lines_of(("memory of", "over", "state", "connect", "GB/s", "4 KiB read", ""), self._cells())]
        return "\n".join(lines)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.agent,
                row.transport,
                row.state,
                "" if row.connect_ms is None else f"{row.connect_ms:.1f} ms",
                "" if row.gbps is None else f"{row.gbps:.2f}",
                "" if row.latency_us is None else f"{row.latency_us:.0f} us",
                row.reason,
            )
            for row in self.transports
        ]


def lines_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for the heads, then one per row. The last column is as wide as it likes: a terminal wraps it. What a
    peer says of itself cannot move the cursor or add a line."""
    lines = [heads, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
    return ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines]


def printable(text: str) -> str:
    """Without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
