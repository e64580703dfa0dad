"""What the self-test found: a text to paste into an issue, or one JSON object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd_connector.doctor.report import Report, Row, State, lines_of, printable

NOTE = (
    "The Ascend transports were written and tried against emulated libraries; nobody of this project has run them on "
    "an NPU. If this report comes from one, please send it whatever it says."
)
SEND = "put this whole report into an issue"


class Read(msgspec.Struct, frozen=True):
    """Scattered blocks of one size. ``gbps``: 10**9 bytes per second, the best of a few reads; every one of them is
    compared, byte by byte."""

    block_bytes: int
    num_bytes: int
    gbps: float
    verified: bool
    found: str = ""


class Step(msgspec.Struct, frozen=True):
    """Something that goes wrong on purpose, and whether it was dealt with."""

    name: str
    passed: bool
    found: str
    remedy: str = ""


class Trial(msgspec.Struct):
    """One transport between two processes. ``devices``: the owner's and the reader's; ``unreachable`` is no failure;
    ``problem`` ended the trial before its end."""

    transport: str
    memory: str
    devices: tuple[int, int] | None = None
    connect_ms: float | None = None
    reads: list[Read] = []
    steps: list[Step] = []
    unreachable: str = ""
    problem: str = ""
    remedy: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and all(read.verified for read in self.reads) and all(s.passed for s in self.steps)


class Unavailable(msgspec.Struct, frozen=True):
    """A transport, or its way with one kind of memory. ``wanted``: it was asked for by name, so this is a failure."""

    transport: str
    memory: str
    reason: str
    wanted: bool = False


@dataclass
class Findings:
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    unavailable: list[Unavailable] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        tried = [trial for trial in self.trials if not trial.unreachable]
        return (
            not tried
            or not all(trial.passed for trial in tried)
            or any(each.wanted for each in self.unavailable)
            or any(row.state is State.FAIL for row in self.rows)
        )

    def as_json(self) -> str:
        told: dict[str, Any] = msgspec.to_builtins(self)
        for trial, made in zip(self.trials, told["trials"], strict=True):
            made["passed"] = trial.passed
        return msgspec.json.encode({**told, "failed": self.failed, "note": NOTE}).decode()

    def as_text(self) -> str:
        lines = ["pdc doctor --selftest", *(f"  {name}: {printable(words)}" for name, words in self.versions.items())]
        lines += ["", NOTE, ""]
        if self.rows:
            lines += [Report(self.rows).as_text(), ""]
        for trial in self.trials:
            lines += [*_trial(trial), ""]
        if self.unavailable:
            lines += ["not tried:", *(f"  {u.transport} ({u.memory}): {printable(u.reason)}" for u in self.unavailable)]
        verdict = f"FAILED: {SEND}" if self.failed else "passed"
        return "\n".join([*lines, "", f"verdict: {verdict} ({self.seconds:.0f} s)"])


def _trial(trial: Trial) -> list[str]:
    """One transport with one kind of memory, as lines."""
    where = f", devices {trial.devices[0]} and {trial.devices[1]}" if trial.devices else ""
    connected = f", connected in {trial.connect_ms:.1f} ms" if trial.connect_ms is not None else ""
    state = "unreachable" if trial.unreachable else "passed" if trial.passed else "FAILED"
    lines = [f"{trial.transport}, {trial.memory} memory{where}: {state}{connected}"]
    if trial.unreachable:
        lines.append(f"  {printable(trial.unreachable)}")
    cells = [
        (size_words(read.block_bytes), f"{read.gbps:.2f}", "yes" if read.verified else "NO", read.found)
        for read in trial.reads
    ]
    if cells:
        lines += [f"  {line}" for line in lines_of(("blocks of", "GB/s", "verified", ""), cells)]
    for step in trial.steps:
        lines.append(f"  {step.name}: {'ok' if step.passed else 'FAILED'}: {printable(step.found)}")
        lines += _remedy(step.remedy)
    if trial.problem:
        lines.append(f"  {printable(trial.problem)}")
    return lines + _remedy(trial.remedy)


def _remedy(words: str) -> list[str]:
    return [f"  -> {words}"] if words else []


def size_words(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
