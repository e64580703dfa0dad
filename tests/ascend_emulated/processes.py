"""Other processes and threads for the tests of the emulated libraries."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .build import build

SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def peer(body: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """Another process, which runs the body with its end of a pipe."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=body, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        here.close()
        process.kill()
        process.join()


def stop(process: BaseProcess) -> None:
    """Every thread of it: the signal alone is on its way to some of them."""
    os.kill(process.pid or 0, signal.SIGSTOP)
    threads = list(Path(f"/proc/{process.pid}/task").iterdir())
    while any(") T " not in (thread / "stat").read_text() for thread in threads):
        time.sleep(0.001)


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from ctypes import *\nacl = CDLL('libascendcl.so')\n{code}"],
        env={**os.environ, "LD_LIBRARY_PATH": str(build()), **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
