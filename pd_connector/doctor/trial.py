"""One transport between two processes: reads of every size, then what goes wrong on purpose."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pd_connector.doctor.child import Child
from pd_connector.doctor.findings import SEND, Read, Step, Trial
from pd_connector.doctor.testbed import SIZES
from pd_connector.doctor.worker import CONNECT_S, LOST_S, READ_S
from pd_connector.errors import PDError, PeerLost, TransferFailed
from pd_connector.memory import MemoryKind
from pd_connector.transport.base import Status

_START_S, _SLACK_S, _CLOSE_S = 20.0, 3.0, 5.0
_MOST_READS_S = 4 * READ_S
_NPU_HINT = "set HCCL_INTRA_ROCE_ENABLE=1 (same host), look at the newest plog in ~/ascend/log"
_DO_NOT_USE = f"do not use this transport, and {SEND}"


@dataclass(frozen=True)
class Case:
    """``devices``: of the owner and the reader; ``wrong_byte``: the owner's memory is not what it should be, which must
    show; ``end``: when all of it must be over (monotonic)."""

    transport: str
    memory: MemoryKind
    devices: tuple[int, int]
    options: Mapping[str, Any]
    end: float
    wrong_byte: bool = False

    def where(self, side: int) -> dict[str, Any]:
        """Arguments of a process's start."""
        options, device = dict(self.options), self.devices[side]
        if self.transport == "hixl" and self.memory is MemoryKind.HOST:  # what lies on a device says so itself
            options.setdefault("device", device)
        return {"transport": self.transport, "options": options, "memory": self.memory, "device": device}


def run(case: Case, started: Callable[[Child], None] = lambda child: None) -> Trial:
    """Never raises for what the transport does. ``started`` is told of both processes."""
    devices = None if case.memory is MemoryKind.HOST else case.devices
    trial = Trial(case.transport, case.memory, devices)
    try:
        with Child("owner") as owner, Child("reader") as reader:
            for child in (owner, reader):
                started(child)
            _Run(case, trial, owner, reader).all()
    except PDError as error:
        trial.problem, trial.remedy = str(error), _remedy(error, case)
    return trial


class _Run:
    def __init__(self, case: Case, trial: Trial, owner: Child, reader: Child) -> None:
        self._case, self._trial, self._owner, self._reader = case, trial, owner, reader

    def all(self) -> None:
        shared = {"seed": secrets.randbits(24), "capability": secrets.token_hex(16)}
        remote = self._ask(self._owner, "own", _START_S, **shared, **self._case.where(0))
        if self._case.wrong_byte:
            self._ask(self._owner, "spoil", READ_S)
        limit = _START_S + CONNECT_S
        told = self._ask(self._reader, "connect", limit, **shared, remote=remote, **self._case.where(1))
        if "unreachable" in told:
            self._trial.unreachable = told["unreachable"]
            return
        self._trial.connect_ms = round(told["connect_ms"], 3)
        for group in range(len(SIZES)):
            self._read(group)
        self._wrong_capability()
        self._wrong_byte()
        self._killed_peer()
        self._ask(self._reader, "close", _CLOSE_S)

    def _ask(self, child: Child, command: str, seconds: float, **arguments: Any) -> Any:
        left = self._case.end - time.monotonic()
        if left <= 0:
            raise PeerLost(f"the time for the whole self-test was over before {command!r}")
        return child.ask(command, min(seconds + _SLACK_S, left), **arguments)

    def _read(self, group: int) -> None:
        told = self._ask(self._reader, "read", _MOST_READS_S, group=group)
        wrong = told["wrong"]
        read = Read(SIZES[group], told["num_bytes"], round(told["gbps"], 3), not wrong, wrong)
        self._trial.reads = [*self._trial.reads, read]
        if wrong:
            self._trial.remedy = _DO_NOT_USE

    def _step(self, name: str, passed: bool, found: str, remedy: str) -> None:
        self._trial.steps = [*self._trial.steps, Step(name, passed, found, "" if passed else remedy)]

    def _wrong_capability(self) -> None:
        told = self._ask(self._reader, "intrude", READ_S)
        refused = told["status"] == Status.NOT_GRANTED and not told["touched"]
        words = f"ended {told['status']}: {told['detail']}" + ("; bytes came all the same" if told["touched"] else "")
        self._step("a wrong capability", refused, words, _DO_NOT_USE)

    def _wrong_byte(self) -> None:
        """Whether the comparison would show one: else every "yes" above means nothing."""
        if self._case.wrong_byte:
            return
        self._ask(self._owner, "spoil", READ_S)
        wrong = self._ask(self._reader, "read", _MOST_READS_S, group=len(SIZES) - 1)["wrong"]
        self._ask(self._owner, "spoil", READ_S)
        self._step("a planted wrong byte", bool(wrong), wrong or "not noticed", f"trust no line above, and {SEND}")

    def _killed_peer(self) -> None:
        speed = max((read.gbps for read in self._trial.reads), default=1.0)
        self._ask(self._reader, "begin", READ_S, gbps=speed)
        killed = time.monotonic()
        self._owner.kill()
        told = self._ask(self._reader, "end", 2 * LOST_S, killed=killed)
        words = f"the read ended {told['status']} after {told['seconds']:.2f} s: {told['detail']}"
        if told["status"] == Status.DONE:
            words = f"the read was over before its owner, {told['wrong'] or 'every byte is right'}"
        typed = told["status"] == Status.PEER_LOST or (told["status"] == Status.DONE and not told["wrong"])
        noticed = typed and told["after"] == Status.PEER_LOST
        if told["after"] != Status.PEER_LOST:
            words += f"; the next one ended {told['after']}: {told['after_detail']}"
        self._step("a killed peer", noticed, words, f"leave it out of `transport`, and {SEND}")


def _remedy(error: PDError, case: Case) -> str:
    npu = f"{_NPU_HINT}; " if case.memory is MemoryKind.NPU else ""
    alone = f"run it alone with --transport {case.transport}"
    if isinstance(error, TransferFailed):
        return f"{npu}mend what it names ({alone}), until then leave it out of `transport`"
    return f"{npu}{alone}; if it ends so again, {SEND}"
