"""A rival library doing the work of benchmarks/bench_transport.py: two processes of its own, one read at a time.

with veth.pair(), Rival("nixl", "tuned", "veth", 65536, 64, False) as rival:
    print(rival.iterate())
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rivals import venvs
from rivals.work import GRIDS

from pd_connector.bench import veth

VARIANTS = (("nixl", "default"), ("nixl", "tuned"), ("mooncake", "default"))
START_S, READ_S, QUIT_S = 90.0, 120.0, 2.0
LOG_TAIL = 1500
LOOPBACK = "127.0.0.1"
Scope = Literal["host", "veth"]


class RivalError(Exception):
    """A rival failed or took too long; the message names it, the stage and the end of its log."""


@dataclass(frozen=True)
class Sample:
    """One verified read. ``cpu_s_per_gb`` is of both processes, from the post to the completion."""

    gbps: float
    cpu_s_per_gb: float


def rivals_here() -> list[tuple[str, str]]:
    """(name, variant) of what is installed; see venvs.py."""
    return [(name, variant) for name, variant in VARIANTS if venvs.python_of(name)]


class _Side:
    """One process of a rival, spoken to in JSON lines."""

    def __init__(self, name: str, role: str, prefix: list[str]) -> None:
        python = venvs.python_of(name)
        if python is None:
            raise RivalError(f"{name} is not installed: run benchmarks/rivals/venvs.py")
        self._who = f"{name} {role}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        script = Path(__file__).with_name(f"{name}_side.py")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*prefix, str(python), str(script), role], stdin=pipe, stdout=pipe, stderr=self._log, bufsize=0
        )
        self._received = b""

    def send(self, message: dict[str, Any], stage: str) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._error(stage, str(error)) from None

    def answer(self, stage: str, limit_s: float) -> dict[str, Any]:
        """The next line it sends. Raises RivalError."""
        assert self._process.stdout
        end = time.monotonic() + limit_s
        while b"\n" not in self._received:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise self._error(stage, f"nothing within {limit_s:.0f} s")
            received = os.read(self._process.stdout.fileno(), 65536)
            if not received:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(QUIT_S)
                raise self._error(stage, f"ended with status {self._process.returncode}")
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """After kill(): wait for its end."""
        self._process.wait(QUIT_S)
        for file in (self._process.stdin, self._process.stdout, self._log):
            assert file
            with contextlib.suppress(OSError):
                file.close()

    def _error(self, stage: str, what: str) -> RivalError:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL))
        return RivalError(f"{self._who}, {stage}: {what}\n{self._log.read().decode(errors='replace')}")


class Rival:
    """Both processes of a rival, stopped but for their own reads, so that no spinning thread slows others down.

    Between two network namespaces (scope "veth") the caller holds `veth.pair()` open. ``settings`` are the environment
    variables that the rival was given.
    """

    def __init__(self, name: str, variant: str, scope: Scope, chunk_bytes: int, blocks: int, huge: bool) -> None:
        self.name, self.variant = name, variant
        self.settings: dict[str, str] = {}
        self._num_bytes = GRIDS * blocks * chunk_bytes
        self._scope = scope
        self._work = {
            "chunk": chunk_bytes,
            "blocks": blocks,
            "huge": huge,
            "scope": scope,
            "tuned": variant == "tuned",
        }
        self._seeds = itertools.count(int.from_bytes(os.urandom(6), "little"))
        self._sides: list[_Side] = []

    def __enter__(self) -> Self:
        try:
            across = self._scope == "veth"
            prefix = ["ip", "netns", "exec", veth.SPACE] if across else []
            owner = self._start("owner", prefix, veth.THERE if across else LOOPBACK, {})
            peer = owner.answer("start", START_S)
            self.settings = peer.pop("settings")
            reader = self._start("reader", [], veth.HERE if across else LOOPBACK, peer)
            reader.answer("start", START_S)
            self._signal(signal.SIGSTOP)
            self.iterate()  # the first read connects
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._kill()

    def iterate(self) -> Sample:
        """Read other random blocks, and check every byte. Raises RivalError."""
        owner, reader = self._sides
        with self._running():
            owner.send({"touch": True}, "touch")
            owner.answer("touch", READ_S)
            reader.send({"read": next(self._seeds)}, "read")
            done = reader.answer("read", READ_S)
        if not done["verified"]:
            raise RivalError(f"{self.name} {self.variant}: wrong bytes")
        return Sample(self._num_bytes / done["seconds"] / 1e9, done["cpu_s"] / self._num_bytes * 1e9)

    def _start(self, role: str, prefix: list[str], address: str, peer: dict[str, Any]) -> _Side:
        side = _Side(self.name, role, prefix)
        self._sides.append(side)
        side.send({**self._work, "address": address, "peer": peer}, "start")
        return side

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for side in self._sides:
            side.signal(number)

    def _kill(self) -> None:
        for side in self._sides:
            side.kill()
        while self._sides:
            self._sides.pop().close()
