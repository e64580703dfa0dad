"""Whatever breaks ends in a typed error soon, and works again when it is mended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pd_connector import Agent, Config, TransportUnavailable
from pd_connector.memory import BlockGrid, Region
from pd_connector.testing.owner_process import ProcessOwner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport.base import Status
from pd_connector.transport.verbs import VerbsTransport

from .rxe import hardware, pair, second_rail, sh, wait_for_port

NOTICED_S = 2.0


def test_a_key_that_is_wrong(tmp_path: Path) -> None:
    """The owner's memory was registered anew while it was read: its device refuses the old keys."""
    with pair("big") as over:
        served = over.owner.transport  # type: ignore[attr-defined]
        over.target.poison()
        tag = over.read(over.long(range(63)))
        over.catch()
        served.unregister()
        ended = over.wait(tag)
        assert ended.status is Status.PEER_LOST
        assert "does not know that key" in ended.detail or "does not exist" in ended.detail, ended
        served.register(over.owner.arena.regions)  # type: ignore[attr-defined]
        assert over.wait(over.connect()).status is Status.DONE
        over.settle()


def test_an_owner_is_killed_while_it_is_read() -> None:
    owner = ProcessOwner("verbs", {}, "big", SEED)
    reader = VerbsTransport("reader", {})
    over = Pair(reader, owner, "big")
    over.target.poison()
    tag = over.read(over.long(range(63)))
    over.catch()
    owner.signal(signal.SIGKILL)
    start = time.monotonic()
    ended = over.wait(tag)
    assert ended.status is Status.PEER_LOST, ended
    assert time.monotonic() - start < NOTICED_S
    reader.close()
    owner.close()


def test_the_link_goes_down_and_comes_back() -> None:
    with pair("big") as over:
        over.target.poison()
        tag = over.read(over.long(range(63)))
        over.catch()
        sh("ip", "link", "set", "eth0", "down")
        try:
            start = time.monotonic()
            ended = over.wait(tag)
            assert ended.status is Status.PEER_LOST, ended
            assert "rxe0:1" in ended.detail
            assert time.monotonic() - start < NOTICED_S
            assert over.wait(over.connect()).status is Status.PEER_LOST
        finally:
            sh("ip", "link", "set", "eth0", "up")
        wait_for_port("rxe0")
        end = time.monotonic() + 20
        while over.wait(over.connect()).status is not Status.DONE:
            assert time.monotonic() < end
            time.sleep(0.2)
        over.settle()


_LOCKED = """
import asyncio, encodings.idna, os, resource
import numpy as np
import pd_connector._native, pd_connector.runtime.agent, pd_connector.transport.verbs
from pd_connector import Agent, BlockGrid, Config, Region, TransportUnavailable
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setgid(65534); os.setuid(65534)

async def main():
    array = np.zeros(1 << 20, np.uint8)
    region = Region(array.ctypes.data, array.nbytes, (BlockGrid(0, 0, 0, 4096, 4096, 256),), keepalive=array)
    for transport in (["verbs"], "auto"):
        try:
            async with Agent(Config(transport=transport)) as agent:
                agent.register([region])
                print("registered", transport)
        except TransportUnavailable as error:
            print("refused", error.reason)

asyncio.run(main())
"""


def test_too_little_memory_may_be_locked() -> None:
    """By name it is an error that says what to do; automatically another transport does it."""
    sh("chmod", "666", "/dev/infiniband/uverbs0")
    done = subprocess.run([sys.executable, "-c", _LOCKED], capture_output=True, text=True, timeout=100, cwd=Path.cwd())
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert lines[0].startswith("refused")
    assert "ulimit -l unlimited" in lines[0]
    assert lines[1] == "registered auto"


def region_of(array: np.ndarray, **more: object) -> Region:
    return Region(array.ctypes.data, array.nbytes, (BlockGrid(0, 0, 0, 4096, 4096, 16),), keepalive=array, **more)  # type: ignore[arg-type]


def test_registration_with_paging_falls_back_to_pinning() -> None:
    with pair("mixed", on_demand_paging=True) as over:
        assert over.reader.counters()["on_demand"] == 0  # type: ignore[attr-defined]
        over.settle()


def test_a_dma_buf_that_is_refused_falls_back_to_its_address() -> None:
    transport = VerbsTransport("reader", {})
    array = np.zeros(65536, np.uint8)
    file = os.memfd_create("not-a-dma-buf")
    transport.register([region_of(array, dma_buf=(file, 0))])
    assert transport.counters()["dma_bufs"] == 0
    transport.close()
    os.close(file)


def test_device_memory_that_nothing_can_register() -> None:
    """Neither as a dma-buf nor by its address: the error names both ways, and the one that is left."""
    transport = VerbsTransport("reader", {})
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    hole = libc.mmap(None, 65536, 0, 0x22, -1, 0)  # no access at all, as a device's address is to the processor
    file = os.memfd_create("not-a-dma-buf")
    region = Region(hole, 65536, (BlockGrid(0, 0, 0, 4096, 4096, 16),), dma_buf=(file, 0))
    with pytest.raises(TransportUnavailable, match=r"as a dma-buf: .*; by its address: .*stage it"):
        transport.register([region])
    transport.register([region_of(np.zeros(65536, np.uint8))])
    transport.close()
    os.close(file)


@contextmanager
def queue_pairs(most: int) -> Iterator[None]:
    """This process may have so many objects of rxe0."""
    sh("sh", "-c", "echo +rdma >/sys/fs/cgroup/cgroup.subtree_control")
    group = Path("/sys/fs/cgroup/scarce")
    group.mkdir()
    (group / "rdma.max").write_text(f"rxe0 hca_handle=max hca_object={most}")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def test_no_queue_pair_is_left() -> None:
    with queue_pairs(40):
        owner = VerbsTransport("owner", {})
        readers, ended = [], None
        for index in range(20):
            reader = VerbsTransport(f"reader{index}", {"queue_pairs": 4})
            readers.append(reader)
            reader.connect("owner#1", owner.describe(), 1)
            end = time.monotonic() + 10
            while not (found := reader.poll(1)) and time.monotonic() < end:
                time.sleep(0.01)
            (ended,) = found
            if ended.status is not Status.DONE:
                break
        assert ended is not None
        assert ended.status is Status.PEER_LOST
        assert "queue" in ended.detail, ended
        assert "fewer peers" in ended.detail
        readers[0].close()  # there is room again
        time.sleep(0.5)
        reader.connect("owner#1", owner.describe(), 2)
        end = time.monotonic() + 10
        while not (found := reader.poll(1)) and time.monotonic() < end:
            time.sleep(0.01)
        assert found[0].status is Status.DONE, found
        for each in [*readers[1:], owner]:
            each.close()


def test_one_of_two_rails_is_lost_and_the_transfer_goes_on() -> None:
    with second_rail(), pair("big") as over:
        over.wait(over.connect())
        counters = over.reader.counters  # type: ignore[attr-defined]
        end = time.monotonic() + 10
        while counters()["lanes_opened"] < 4 and time.monotonic() < end:
            time.sleep(0.05)
        over.target.poison()
        before = hardware("rxe1")["sent_pkts"]
        plan = over.long(range(63))
        tag = over.read(plan)
        over.catch()
        while hardware("rxe1")["sent_pkts"] == before:
            assert tag not in over.ended
            time.sleep(0.001)
        sh("ip", "link", "set", "d0", "down")
        assert over.wait(tag).status is Status.DONE
        assert over.target.same(over.target.expect(over.blocks(range(63)), over.source, over.target.arrays))
        assert counters()["lanes_lost"] > 0
        left = hardware("rxe1")["sent_pkts"]
        over.settle()
        assert hardware("rxe1")["sent_pkts"] == left
        sh("ip", "link", "set", "d0", "up")
        wait_for_port("rxe1")
        while counters()["lanes_opened"] < 6:  # they come back by themselves
            assert time.monotonic() < end + 60
            over.settle()
            time.sleep(0.1)


def test_strangers_at_the_door() -> None:
    """Nonsense, and greetings of others, cost their sender the connection and nobody else anything."""
    import random
    import socket
    import struct

    with pair("mixed") as over:
        where = over.owner.describe()
        family, port = struct.unpack_from("=HH", where, 24)
        assert family == 4
        rng = random.Random(SEED)
        join = struct.Struct("=II8s16sIIIIHBB16s")
        good = join.pack(1, join.size - 8, where[:8], where[8:24], 0, 0, 1, 1, 0, 5, 16, where[48:64])
        for turn in range(300):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as door:
                words = bytearray(good)
                if turn % 3 == 0:
                    words = bytearray(rng.randbytes(rng.randrange(200)))
                elif turn % 3 == 1:
                    for _ in range(rng.randrange(1, 4)):
                        words[rng.randrange(len(words))] = rng.randrange(256)
                else:  # joined, then nonsense
                    words += struct.pack("=II", rng.randrange(9), rng.randrange(1 << 17)) + rng.randbytes(
                        rng.randrange(400)
                    )
                door.sendall(words)
                if turn % 2:
                    door.settimeout(0.02)
                    with contextlib.suppress(OSError):
                        door.recv(4096)
            if turn % 50 == 0:
                over.settle()
        over.settle()


async def test_a_device_that_does_not_exist() -> None:
    config = Config(transport=["verbs"], transport_options={"verbs": {"devices": ["mlx5_9"]}})
    async with Agent(config) as agent:
        with pytest.raises(TransportUnavailable, match="mlx5_9: there is no such port"):
            agent.register([region_of(np.zeros(65536, np.uint8))])
