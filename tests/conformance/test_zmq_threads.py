"""Where and how the zmq transport's threads run, libzmq's own among them."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from pd_connector.transport.zmq import NICE, ZmqTransport


def nice_values() -> dict[str, int]:
    """Per thread of this process, by its kernel id."""
    stats = {task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()}
    return {thread: int(stat.rpartition(")")[2].split()[16]) for thread, stat in stats.items()}


def allowed() -> int:
    """The nice value that a thread gets which asks for NICE here."""
    got: list[int] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
        got.append(os.getpriority(os.PRIO_PROCESS, 0))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return got[0]


def test_its_threads_run_before_those_of_the_engine_where_the_process_may() -> None:
    before = nice_values()
    transport = ZmqTransport("agent", {})
    try:
        after = nice_values()
    finally:
        transport.close()
    ours = {after[thread] for thread in after.keys() - before.keys()}
    assert ours == {allowed()}
    assert {thread: after[thread] for thread in before.keys() & after.keys()} == {
        thread: before[thread] for thread in before.keys() & after.keys()
    }
