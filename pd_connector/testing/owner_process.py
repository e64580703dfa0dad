"""The owner of a conformance test, in this process or in one of its own that a test may stop and kill.

Run as a module it serves one agent: a JSON line per command on stdin, a JSON line per answer on stdout.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

import pd_connector.errors
from pd_connector.testing.arena import GEOMETRIES, PRIVATE, Arena
from pd_connector.transport.base import LeaseId, Transport
from pd_connector.transport.registry import load

ANSWER_S = 20.0


class Owner(Protocol):
    def describe(self) -> bytes: ...
    def grant(self, lease: LeaseId, capability: bytes, blocks: Mapping[int, Sequence[int]]) -> None: ...
    def revoke(self, lease: LeaseId) -> None: ...
    def close(self) -> None: ...


class LocalOwner:
    """``transport`` with memory of a named geometry, in this process. ``memory``: what kind, or the arena itself."""

    def __init__(self, transport: Transport, geometry: str, seed: int, memory: str | Arena = PRIVATE) -> None:
        self.transport = transport
        self.arena = memory if isinstance(memory, Arena) else Arena(GEOMETRIES[geometry], seed, memory)
        transport.register(self.arena.regions)

    def describe(self) -> bytes:
        return self.transport.describe()

    def grant(self, lease: LeaseId, capability: bytes, blocks: Mapping[int, Sequence[int]]) -> None:
        arrays = {int(group): np.array(ids, np.uint32) for group, ids in blocks.items()}
        self.transport.grant(lease, capability, arrays)

    def revoke(self, lease: LeaseId) -> None:
        self.transport.revoke(lease)

    def close(self) -> None:
        self.transport.close()


class ProcessOwner:
    """The same in another process: ``name`` and ``options`` go through the registry there."""

    def __init__(self, name: str, options: Mapping[str, Any], geometry: str, seed: int, memory: str = PRIVATE) -> None:
        root = str(Path(pd_connector.errors.__file__).parents[1])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __spec__.name,
                msgspec.json.encode([name, options, geometry, seed, memory]).decode(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,  # found there even when the package is not installed
        )
        self._unread = b""
        self._description = bytes.fromhex(self._answer())

    def describe(self) -> bytes:
        return self._description

    def grant(self, lease: LeaseId, capability: bytes, blocks: Mapping[int, Sequence[int]]) -> None:
        ids = {str(group): [int(block) for block in list_] for group, list_ in blocks.items()}
        self._ask("grant", lease.number, lease.epoch, capability.hex(), ids)

    def revoke(self, lease: LeaseId) -> None:
        self._ask("revoke", lease.number, lease.epoch)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(ANSWER_S)  # it dies when the kernel gets to it

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait(ANSWER_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        end = time.monotonic() + ANSWER_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not more:
                self.close()
                raise RuntimeError(f"the owner's process ended or did not answer within {ANSWER_S} s")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return msgspec.json.decode(line, type=str)


def main() -> None:
    name, options, geometry, seed, memory = msgspec.json.decode(sys.argv[1])
    owner = LocalOwner(load(name)("owner", options), geometry, seed, memory)
    print(msgspec.json.encode(owner.describe().hex()).decode(), flush=True)
    for line in sys.stdin:
        command, number, epoch, *rest = msgspec.json.decode(line)
        if command == "grant":
            owner.grant(LeaseId(number, epoch), bytes.fromhex(rest[0]), rest[1])
        else:
            owner.revoke(LeaseId(number, epoch))
        print('"ok"', flush=True)
    owner.close()


if __name__ == "__main__":
    main()
