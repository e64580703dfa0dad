"""Two processes on real GPUs, over CUDA IPC or GPUDirect RDMA: every byte compared, GB/s printed. Exits with 1 where
it fails.

`python scripts/check_cuda.py --owner 0 --reader 1`
"""

from __future__ import annotations

import argparse
import multiprocessing
import select
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.errors import PDError
from pd_connector.memory import BlockGrid, MemoryKind, Region, order_grids
from pd_connector.plan import CopyPlan, Dim, Pattern, coalesce, whole_patterns
from pd_connector.transport.base import LeaseId, Status, Transport
from pd_connector.transport.device import Device, Direction
from pd_connector.transport.registry import start

BLOCK, RUN = 1 << 20, 256
LEASE, CAPABILITY = LeaseId(1, 1), b"check_cuda-12345"
WAIT_S = 60.0


class Memory:
    """So many blocks on a GPU, and how to fill and look at them."""

    def __init__(self, gpu: int, blocks: int) -> None:
        self.device = Device(MemoryKind.CUDA, gpu)
        self.size = blocks * BLOCK
        self.address = self.device.alloc(self.size)
        whole = np.zeros(self.size + 4096, np.uint8)
        skip = -whole.ctypes.data % 4096
        self.host = whole[skip : skip + self.size]
        self.device.pin(self.host.ctypes.data, self.size)
        self.regions = [Region(self.address, self.size, (BlockGrid(0, 0, 0, BLOCK, BLOCK, blocks),), MemoryKind.CUDA)]

    def fill(self, data: npt.NDArray[np.uint8]) -> None:
        self.host[:] = data
        moves = np.array([(self.address, self.host.ctypes.data, self.size)], np.uint64)
        self.device.move(moves, Direction.TO_DEVICE)

    def look(self) -> npt.NDArray[np.uint8]:
        moves = np.array([(self.host.ctypes.data, self.address, self.size)], np.uint64)
        self.device.move(moves, Direction.TO_HOST)
        return self.host


def contents(blocks: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, blocks * BLOCK, np.uint8)


def make(name: str, memory: Memory) -> Transport:
    started, _ = start([name], "check", {}, memory.regions)
    started[name].register(memory.regions)
    return started[name]


def own(name: str, gpu: int, blocks: int, pipe: Connection) -> None:
    try:
        memory = Memory(gpu, blocks)
        memory.fill(contents(blocks))
        transport = make(name, memory)
        transport.grant(LEASE, CAPABILITY, {0: np.arange(blocks, dtype=np.uint32)})
    except PDError as error:
        pipe.send(f"the owner: {error}")
        return
    pipe.send(transport.describe())
    pipe.poll(None)  # until the reader ends
    transport.close()


def wait(transport: Transport, tag: int) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        select.select([transport.fileno()], [], [], 1.0)
        for completion in transport.poll(8):
            if completion.status is not Status.DONE:
                raise SystemExit(f"check_cuda: {completion.status}: {completion.detail}")
            if completion.tag == tag:
                return
    raise SystemExit(f"check_cuda: no answer within {WAIT_S:g} s")


def plans(memory: Memory, blocks: int) -> dict[str, CopyPlan]:
    order = np.random.default_rng(3).permutation(blocks).tolist()
    runs, whole = coalesce(order, order), whole_patterns(order_grids(memory.regions), 0)
    count = BLOCK // RUN // 2
    halves = tuple(Pattern(0, 0, half * RUN, half * RUN, RUN, (Dim(count, 2 * RUN, 2 * RUN),)) for half in (0, 1))
    return {f"blocks of {BLOCK} bytes": CopyPlan(runs, whole), f"runs of {RUN} bytes": CopyPlan(runs, halves)}


def read(name: str, gpu: int, blocks: int, description: bytes) -> bool:
    memory, expected = Memory(gpu, blocks), contents(blocks)
    transport = make(name, memory)
    reason = transport.can_reach(description)
    if reason is not None:
        raise SystemExit(f"check_cuda: {reason}")
    transport.connect("owner", description, 1)
    wait(transport, 1)
    fine, tag = True, 1
    for what, plan in plans(memory, blocks).items():
        seconds = []
        memory.fill(np.zeros(memory.size, np.uint8))
        for _ in range(4):
            tag += 1
            start = time.perf_counter()
            transport.post_read("owner", LEASE, CAPABILITY, plan, tag)
            wait(transport, tag)
            seconds.append(time.perf_counter() - start)
        same = bool(np.array_equal(memory.look(), expected))
        fine &= same
        verdict = "every byte is right" if same else "WRONG BYTES"
        print(f"{what}: {verdict}, {memory.size / min(seconds) / 1e9:.1f} GB/s")
    transport.close()
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--owner", type=int, default=0, help="the GPU that is read from")
    parser.add_argument("--reader", type=int, default=0, help="the GPU that reads")
    parser.add_argument("--transport", choices=("cuda", "verbs"), default="cuda")
    parser.add_argument("--blocks", type=int, default=512, help="MiB on each side")
    given = parser.parse_args(arguments)
    spawn: Any = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    owner = spawn.Process(target=own, args=(given.transport, given.owner, given.blocks, there), daemon=True)
    owner.start()
    try:
        if not here.poll(WAIT_S):
            raise SystemExit(f"check_cuda: the owner did not start within {WAIT_S:g} s")
        description = here.recv()
        if isinstance(description, str):
            raise SystemExit(f"check_cuda: {description}")
        return 0 if read(given.transport, given.reader, given.blocks, description) else 1
    except PDError as error:
        raise SystemExit(f"check_cuda: {error}") from error
    finally:
        owner.kill()
        owner.join()


if __name__ == "__main__":
    sys.exit(main())
