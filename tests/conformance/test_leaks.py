"""Cycles of connecting, reading and losing the owner to SIGKILL, before, while and after it is read from: afterwards
this process has as many descriptors, threads and mappings as before, and no more memory.

`make leak-test CYCLES=1000` runs as many.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pd_connector.bench.work import Cache, Work
from pd_connector.memory import native
from pd_connector.transport.base import Completion, LeaseId, Status, Transport
from pd_connector.transport.registry import load

CYCLES = int(os.environ.get("CYCLES", "60"))
CHUNK, BLOCKS = 8192, 8  # 56 grids: 3.5 MiB a read
LEASE, CAPABILITY = LeaseId(1, 1), b"sixteen bytes..."
DEADLINE_S = 20.0

# It imports once and forks per cycle: the child serves until it is killed.
NURSERY = """
import json, os, sys, time
import numpy as np
from pd_connector.bench.work import Cache
from pd_connector.transport.base import LeaseId
from pd_connector.transport.registry import load
name, pooled, chunk, blocks, number, epoch, capability = json.loads(sys.argv[1])
kind = load(name)
for _ in sys.stdin:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    transport = kind("owner", {})
    cache = Cache(chunk, blocks, pooled=pooled, huge=False)
    cache.fill()
    transport.register([cache.region])
    transport.grant(LeaseId(number, epoch), bytes.fromhex(capability), {0: np.arange(2 * blocks, dtype=np.uint32)})
    print(json.dumps([os.getpid(), transport.describe().hex()]), flush=True)
    while True:
        time.sleep(60)
"""


class Nursery:
    """Makes owners, one at a time, in its process group."""

    def __init__(self, name: str, *, pooled: bool) -> None:
        settings = [name, pooled, CHUNK, BLOCKS, LEASE.number, LEASE.epoch, CAPABILITY.hex()]
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._child = 0

    def owner(self) -> bytes:
        """Start one and return its description."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._child, description = self._line()
        return bytes.fromhex(description)

    def kill(self) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            self._child = 0

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate(timeout=DEADLINE_S)

    def _line(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], DEADLINE_S)[0]:
            raise TimeoutError("no owner came up")
        return json.loads(self._process.stdout.readline())


def finish(transport: Transport, tag: int) -> Completion:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        select.select([transport.fileno()], [], [], 1.0)
        for completion in transport.poll(8):
            if completion.tag == tag:
                return completion
    raise TimeoutError(f"tag {tag} did not end")


def holdings() -> dict[str, int]:
    """What this process holds; memory in KiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "memory": int(status["VmRSS"].split()[0]),
    }


def one_cycle(number: int, nursery: Nursery, reader: Transport, work: Work, tags: count[int]) -> Status:
    """Kill the owner before, while or after it is read from."""
    peer = f"owner {number}"
    reader.connect(peer, nursery.owner(), tag := next(tags))
    assert finish(reader, tag).status is Status.DONE
    moment = number % 3
    if moment == 0:
        nursery.kill()
    reader.post_read(peer, LEASE, CAPABILITY, work.plan(), tag := next(tags))
    if moment == 1:
        nursery.kill()
    completion = finish(reader, tag)
    if completion.status is Status.DONE:
        work.check()
    nursery.kill()
    reader.disconnect(peer)
    return completion.status


@pytest.mark.timeout(60 + CYCLES)
@pytest.mark.parametrize(("name", "pooled"), [("shm", True), ("shm", False), ("tcp", False), ("zmq", False)])
def test_lost_owners_leave_nothing_behind(name: str, pooled: bool) -> None:
    if name != "zmq" and native() is None:
        pytest.skip("the C extension is not built")
    nursery, reader, tags = Nursery(name, pooled=pooled), load(name)("reader", {}), count(1)
    try:
        mine = Cache(CHUNK, BLOCKS, pooled=False, huge=False)
        reader.register([mine.region])
        work = Work(mine)
        ended = [one_cycle(number, nursery, reader, work, tags) for number in range(CYCLES // 4)]
        before = holdings()
        ended += [one_cycle(number, nursery, reader, work, tags) for number in range(CYCLES // 4, CYCLES)]
        end = time.monotonic() + DEADLINE_S
        while (after := holdings())["descriptors"] > before["descriptors"] and time.monotonic() < end:
            time.sleep(0.1)  # what the last owner held is closed in the background
    finally:
        reader.close()
        nursery.close()
    assert ended.count(Status.DONE) >= CYCLES // 3, "the owners that were killed afterwards were read whole"
    assert Status.PEER_LOST in ended, "and some of the others were not"
    print(f"{name}, {'owned' if pooled else 'foreign'}: {CYCLES} cycles, {before} to {after}")
    for what in ("descriptors", "threads", "mappings"):
        assert after[what] <= before[what] + 2, what
    assert after["memory"] <= before["memory"] + 2048, "less than a kilobyte or two per cycle"
