"""Agents with memory on emulated NPUs, in two processes, and what they choose by themselves. Not run on hardware."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from pd_connector import Agent, Config, Ticket, TransferFailed, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region, native
from pd_connector.transport.hccl import HcclTransport
from pd_connector.transport.hixl import HixlTransport

from . import prefill
from .device import npu

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

MODULE = "tests.ascend_emulated.prefill"
GONE = "libcann_hixl.so cannot be opened"


@contextmanager
def without(*gone: type[Any]) -> Iterator[None]:
    patches = [patch.object(each, "probe", classmethod(lambda cls, options: GONE)) for each in gone]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def memory() -> tuple[Region, np.ndarray[Any, np.dtype[np.uint8]]]:
    placed = npu(prefill.BLOCKS * prefill.BLOCK_BYTES)
    grid = BlockGrid(0, 0, 0, prefill.BLOCK_BYTES, prefill.BLOCK_BYTES, prefill.BLOCKS)
    region = Region(placed.address, placed.array.nbytes, (grid,), placed.kind, placed.keepalive)
    placed.array[:] = 0
    return region, placed.array.reshape(prefill.BLOCKS, prefill.BLOCK_BYTES)


def start(*missing: str, spoil: bool = False) -> subprocess.Popen[bytes]:
    words = [msgspec.json.encode(Config(audit=True)).decode(), *(["spoil"] if spoil else []), *missing]
    return subprocess.Popen([sys.executable, "-m", MODULE, *words], stdout=subprocess.PIPE)


async def pull(process: subprocess.Popen[bytes], config: Config) -> tuple[str, list[bool]]:
    """The transport, and which blocks are those of P's forward."""
    assert process.stdout is not None
    region, bytes_ = memory()
    target = list(range(prefill.BLOCKS))[::-1][: len(prefill.PROMPT)]
    async with Agent(config) as agent:
        agent.register([region])
        line = await asyncio.to_thread(process.stdout.readline)
        stats = await agent.pull(Ticket.from_bytes(bytes.fromhex(line.decode())), target)
    expected = prefill.forward()
    return stats.transport, [bool((bytes_[there] == expected[i]).all()) for i, there in enumerate(target)]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [((), "hixl"), (("hixl",), "hccl"), (("hixl", "hccl"), "staged-shm")],
)
async def test_the_best_that_is_there_is_chosen(missing: tuple[str, ...], expected: str) -> None:
    gone = {"hixl": HixlTransport, "hccl": HcclTransport}
    process = start(*missing)
    try:
        with without(*(gone[name] for name in missing)):
            transport, right = await pull(process, Config(audit=True))
        assert transport == expected
        assert all(right)
    finally:
        process.kill()
        process.wait(20)


async def test_a_control_that_fails() -> None:
    """One byte of P's memory changes after its forward."""
    process = start(spoil=True)
    try:
        _, right = await pull(process, Config())
        assert right.count(False) == 1
    finally:
        process.kill()
        process.wait(20)


async def test_prefill_is_killed() -> None:
    process = start()
    assert process.stdout is not None
    ticket = Ticket.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
    process.kill()
    process.wait(20)
    async with Agent(Config()) as agent:
        agent.register([memory()[0]])
        with pytest.raises((TransferFailed, ConnectionError)):
            await agent.pull(ticket, list(range(len(prefill.PROMPT))), timeout=20)


async def test_a_transport_that_cannot_reach_the_memory_says_what_can() -> None:
    async with Agent(Config(transport=["tcp"])) as agent:
        with pytest.raises(TransportUnavailable, match=r"does not reach npu memory: name staged-tcp"):
            agent.register([memory()[0]])


async def test_why_the_others_are_not_used() -> None:
    async with Agent(Config()) as agent:
        agent.register([memory()[0]])
        offered = agent._driver.courier.describe()  # type: ignore[union-attr]
    assert list(offered) == ["hixl", "staged-shm", "staged-tcp"]
    assert memory()[0].kind is MemoryKind.NPU


async def test_memory_of_two_kinds_goes_over_what_takes_both() -> None:
    host = Region(*_host(), (BlockGrid(1, 0, 0, 4096, 4096, 4),))
    async with Agent(Config()) as agent:
        agent.register([memory()[0], host])
        assert agent.transports == ("hixl",)


def _host() -> tuple[int, int]:
    _KEPT.append(array := np.zeros(4 * 4096, np.uint8))
    return array.ctypes.data, array.nbytes


_KEPT: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
