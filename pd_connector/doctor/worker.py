"""The processes of the self-test: one looks around, one owns memory, one reads it.

Run as a module by ``doctor.child``: a JSON line [command, arguments] on stdin, a JSON line with "result" or "error" on
the descriptor that is its argument.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from pd_connector.doctor import symbols
from pd_connector.doctor.testbed import NUM_BYTES, SIZES, Testbed, scattered, truth
from pd_connector.errors import PDError, TransferFailed
from pd_connector.memory import MemoryKind
from pd_connector.plan import CopyPlan
from pd_connector.transport import registry
from pd_connector.transport.base import Completion, LeaseId, Status, Transport
from pd_connector.transport.device import Device, why_no_device

LEASE = LeaseId(1, 1)
CONNECT_S, READ_S, LOST_S = 10.0, 10.0, 10.0
"""Until each of them counts as failed. Whoever asks waits a little longer."""
_MEASURE_S, _ROUNDS = 0.4, 4
_PEER = "owner#1"
_MIDDLE_GROUP, _MIDDLE_S, _MOST_TIMES = 3, 1.5, 4096
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Worker:
    """Every public method is a command."""

    def __init__(self) -> None:
        self._tags = iter(range(1, 1 << 31))
        self._transport: Transport
        self._bed: Testbed
        self._begun = 0
        self._plan: CopyPlan

    # --- looks around -------------------------------------------------------------------------------------------------

    def look(self, options: dict[str, Any]) -> dict[str, Any]:
        devices: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for kind in (MemoryKind.CUDA, MemoryKind.NPU):
            devices[kind], reasons[kind] = _count(kind)
        return {
            "transports": registry.available(options),
            "memory": {name: _memory(name) for name in registry.known()},
            "devices": devices,
            "no_device": reasons,
            "symbols": [asdict(found) for found in symbols.look()],
        }

    # --- owns ---------------------------------------------------------------------------------------------------------

    def own(self, seed: int, capability: str, **where: Any) -> str:
        """What a reader needs to connect."""
        self._start("self-test-owner", **where)
        self._bed.fill(seed)
        self._transport.register([self._bed.region])
        blocks = {group: np.arange(NUM_BYTES // size, dtype=np.uint32) for group, size in enumerate(SIZES)}
        self._transport.grant(LEASE, bytes.fromhex(capability), blocks)
        return self._transport.describe().hex()

    def spoil(self) -> None:
        self._bed.spoil()

    # --- reads --------------------------------------------------------------------------------------------------------

    def connect(self, seed: int, capability: str, remote: str, **where: Any) -> dict[str, Any]:
        """Why the owner is out of reach, or how many milliseconds it took to connect."""
        self._start("self-test-reader", **where)
        self._seed, self._expected, self._capability = seed, truth(seed), bytes.fromhex(capability)
        self._random = np.random.default_rng(seed)
        self._transport.register([self._bed.region])
        described = bytes.fromhex(remote)
        reason = self._transport.can_reach(described)
        if reason is not None:
            return {"unreachable": reason}
        start, tag = time.perf_counter(), next(self._tags)
        self._transport.connect(_PEER, described, tag)
        self._done("connecting", tag, CONNECT_S)
        return {"connect_ms": (time.perf_counter() - start) * 1e3}

    def read(self, group: int) -> dict[str, Any]:
        """Several reads of one block size, each into poison and each compared: the best of them counts."""
        best, wrong = 0.0, ""
        end = time.monotonic() + _MEASURE_S
        for turn in range(_ROUNDS):
            plan = scattered(group, self._random)
            self._bed.poison()
            start = time.perf_counter()
            self._done("reading", self._post(plan), READ_S)
            best = max(best, plan.num_bytes / (time.perf_counter() - start) / 1e9)
            wrong = self._bed.check(self._expected, plan)
            if wrong or (turn and time.monotonic() > end):
                break
        return {"num_bytes": plan.num_bytes, "gbps": best, "wrong": wrong}

    def intrude(self) -> dict[str, Any]:
        """A read with a capability that nobody granted."""
        self._bed.poison()
        mine, self._capability = self._capability, secrets.token_bytes(len(self._capability))
        try:
            ended = self._wait(self._post(scattered(0, self._random)), READ_S)
        finally:
            self._capability = mine
        return {"status": ended.status, "detail": ended.detail, "touched": self._bed.touched()}

    def begin(self, gbps: float) -> None:
        """Return in the middle of a read that takes a while at this speed."""
        size = scattered(_MIDDLE_GROUP, self._random).num_bytes
        times = min(_MOST_TIMES, max(4, int(gbps * 1e9 * _MIDDLE_S / size)))
        self._plan = scattered(_MIDDLE_GROUP, self._random, times)
        self._bed.poison()
        self._begun = self._post(self._plan)
        end = time.monotonic() + READ_S
        while not self._bed.touched():
            if time.monotonic() > end:
                raise TransferFailed(f"reading: no byte came within {READ_S:g} s")

    def end(self, killed: float) -> dict[str, Any]:
        """How the read ends whose owner was killed then, by a clock that all processes share, and how one ends that is
        posted afterwards."""
        ended = self._wait(self._begun, LOST_S)
        seconds = time.monotonic() - killed
        wrong = self._bed.check(self._expected, self._plan) if ended.status is Status.DONE else ""
        after = self._wait(self._post(scattered(0, self._random)), LOST_S)
        return {
            "status": ended.status,
            "detail": ended.detail,
            "seconds": seconds,
            "wrong": wrong,
            "after": after.status,
            "after_detail": after.detail,
        }

    def close(self) -> None:
        self._transport.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _start(self, agent: str, transport: str, options: dict[str, Any], memory: str, device: int) -> None:
        self._bed = Testbed(MemoryKind(memory), device)
        self._transport = registry.load(transport)(agent, options)

    def _post(self, plan: CopyPlan) -> int:
        tag = next(self._tags)
        self._transport.post_read(_PEER, LEASE, self._capability, plan, tag)
        return tag

    def _done(self, stage: str, tag: int, seconds: float) -> None:
        ended = self._wait(tag, seconds)
        if ended.status is not Status.DONE:
            raise TransferFailed(f"{stage} ended {ended.status}: {ended.detail}")

    def _wait(self, tag: int, seconds: float) -> Completion:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            select.select([self._transport.fileno()], [], [], left)
            for completion in self._transport.poll(8):
                if completion.tag == tag:
                    return completion
        raise TransferFailed(f"no completion came within {seconds:g} s")


def _count(kind: MemoryKind) -> tuple[int, str]:
    """How many devices there are, two at the most, and why there are no more."""
    reason = why_no_device(kind)
    if reason is not None:
        return 0, reason
    for index in range(2):
        try:
            Device(kind, index).close()
        except PDError as error:
            return index, str(error)
    return 2, ""


def _memory(name: str) -> list[str]:
    """Kinds that a transport reads between processes."""
    try:
        return sorted(registry.load(name).traits.memory)
    except (PDError, AttributeError):  # a wrapper has the traits of what it wraps
        return []


def _serve(answers: int) -> None:
    worker = Worker()
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            told: dict[str, Any] = {"result": getattr(worker, command)(**arguments)}
        except PDError as error:
            told = {"error": str(error)}
        except Exception as error:  # whatever a vendor's library makes of us is a finding, not our end
            told = {"error": f"{type(error).__name__}: {error}"}
        os.write(answers, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    # Also when the doctor itself is killed while we hang in a call.
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    _serve(int(sys.argv[1]))
