"""Mooncake's side of the benchmark, run by its own environment: `mooncake_side.py owner|reader`.

Its transfer engine over TCP, without a metadata server, one synchronous batch per request.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import work

# Without these a batch of more than about a thousand chunks is refused because its queues are full.
SETTINGS = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "120000",
}


def make_engine(setup: work.Setup, memory: work.Bytes) -> Any:
    """An engine that knows the memory."""
    os.environ.update(SETTINGS)
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if status := engine.initialize(setup.address, "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError(f"initialize gave {status}")
    if status := engine.register_memory(memory.ctypes.data, memory.nbytes):
        raise RuntimeError(f"register_memory gave {status}")
    return engine


def owner(line: work.Line, setup: work.Setup) -> None:
    memory = work.allocate(setup)
    work.fill(memory)
    engine = make_engine(setup, memory)
    session = f"{setup.address}:{engine.get_rpc_port()}"
    line.send({"pid": os.getpid(), "base": memory.ctypes.data, "session": session, "settings": SETTINGS})
    work.touch_all(line, memory)


def reader(line: work.Line, setup: work.Setup) -> None:
    memory = work.allocate(setup)
    engine = make_engine(setup, memory)

    def prepare(request: work.Request) -> Callable[[], None]:
        here = (memory.ctypes.data + request.target * setup.chunk).tolist()
        there = (setup.peer["base"] + request.source * setup.chunk).tolist()
        lengths = [setup.chunk] * len(here)

        def read() -> None:
            if status := engine.batch_transfer_sync_read(setup.peer["session"], here, there, lengths):
                raise RuntimeError(f"batch_transfer_sync_read gave {status}")

        return read

    line.send({"pid": os.getpid()})
    work.read_all(line, setup, memory, prepare)


if __name__ == "__main__":
    work.run(owner, reader)
