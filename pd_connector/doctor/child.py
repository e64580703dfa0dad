"""A process of ours that does what may crash or hang. Whatever becomes of it, its parent hears of it in words."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pd_connector.errors
from pd_connector.errors import PeerLost, TransferFailed

MODULE = "pd_connector.doctor.worker"
_REAP_S = 5.0
_TAIL_BYTES, _TAIL_LINES = 4096, 12


class Child:
    """Answers come over a pipe of their own: vendors' libraries write to stdout as they like. ``name`` is for words."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._unread = b""
        # Both outputs: what a library wrote last is often the reason why it ended the process.
        self._output = os.memfd_create("pd-child-output")
        self._answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", MODULE, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs,),
                process_group=0,  # Ctrl-C is for us; we end it
                cwd=Path(pd_connector.errors.__file__).parents[1],  # found there even when the package is not installed
            )
        except OSError as error:
            os.close(self._answers)
            os.close(self._output)
            raise PeerLost(f"the {name} cannot be started: {error}") from error
        finally:
            os.close(theirs)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, seconds: float, **arguments: Any) -> Any:
        """Raises TransferFailed with its words where it says that it failed, PeerLost where it died or is silent."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading says how
            self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.kill()
                raise PeerLost(f"the {self.name} did not answer {command!r} within {seconds:.0f} s{self._last_words()}")
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise PeerLost(f"the {self.name} {self._ended()} in {command!r}{self._last_words()}")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        told = json.loads(line)
        if "error" in told:
            raise TransferFailed(told["error"])
        return told["result"]

    def kill(self) -> None:
        self._process.kill()
        self._reap()

    def close(self) -> None:
        self.kill()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(OSError):
            os.close(self._answers)
        os.close(self._output)

    def _reap(self) -> int | None:
        try:
            return self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return None  # in an uninterruptible call of a driver: it goes when the kernel lets it

    def _ended(self) -> str:
        status = self._reap()
        if status is None:
            return "closed its pipe"
        return f"died by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def _last_words(self) -> str:
        size = os.fstat(self._output).st_size
        tail = os.pread(self._output, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        lines = [line.strip() for line in tail.decode(errors="replace").splitlines()]
        said = " | ".join([line for line in lines if line][-_TAIL_LINES:])
        return f"; its last words: {said}" if said else ""
