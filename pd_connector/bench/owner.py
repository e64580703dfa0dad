"""The owner of the memory that a benchmark reads from, in a process of its own.

Run as a module with a Case as JSON it prints its transport's description, then its CPU seconds for every line of input;
one that is not empty has it touch its memory first.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

import pd_connector
from pd_connector.bench import veth
from pd_connector.bench.case import Case, options
from pd_connector.bench.work import Cache
from pd_connector.errors import TransferFailed
from pd_connector.transport.base import LeaseId
from pd_connector.transport.registry import load

LEASE, CAPABILITY = LeaseId(1, 1), b"sixteen bytes..."
START_S = 120.0
ANSWER_S = 20.0


class Owner:
    """The process, as its reader sees it. Raises TransferFailed when it does not answer."""

    def __init__(self, case: Case) -> None:
        self._process = self.start(case, subprocess.PIPE, subprocess.PIPE)

    @staticmethod
    def start(case: Case, stdin: Any, stdout: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __name__, msgspec.json.encode(case).decode()]
        root = Path(pd_connector.__file__).parents[1]  # found there even when the package is not installed
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, cwd=root, process_group=0)

    def __enter__(self) -> Owner:
        try:
            self.description = bytes.fromhex(self._answer(START_S))
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)

    def cpu_seconds(self, *, touch: bool = False) -> float:
        """That it has used so far, once it has touched all of its memory."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"touch\n" if touch else b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended: so says the answer
        return float(self._answer(ANSWER_S))

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise TransferFailed(f"the owner's process ended or said nothing for {seconds:.0f} s; its words are above")
        return msgspec.json.decode(line)


def serve(case: Case) -> None:
    if case.scope == "veth":
        veth.enter()
    transport = load(case.transport)("owner", options(case, veth.THERE))
    cache = Cache(case.chunk_bytes, case.blocks, pooled=case.memory == "owned", huge=case.huge)
    cache.fill()
    transport.register([cache.region])
    transport.grant(LEASE, CAPABILITY, {0: np.arange(2 * case.blocks, dtype=np.uint32)})
    print(msgspec.json.encode(transport.describe().hex()).decode(), flush=True)
    for line in sys.stdin:
        if line.strip():
            cache.touch()
        print(time.process_time(), flush=True)
    transport.close()


if __name__ == "__main__":
    serve(msgspec.json.decode(sys.argv[1], type=Case))
