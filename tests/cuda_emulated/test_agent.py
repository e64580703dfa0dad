"""Agents with memory of an emulated GPU: what ``auto`` makes of it. Not run on hardware."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from pd_connector import Abandoned, Agent, Config
from pd_connector.errors import TransportUnavailable
from pd_connector.memory import MemoryKind
from pd_connector.testing.arena import MIXED, Arena
from pd_connector.transport.cuda import CudaTransport

from .device import GPU, faults


async def test_blocks_of_a_gpu_are_pulled_over_cuda_by_auto() -> None:
    source, target = Arena(MIXED, 1, GPU), Arena(MIXED, 2, GPU)
    async with Agent(Config(), name="P") as p, Agent(Config(), name="D") as d:
        p.register(source.regions)
        d.register(target.regions)
        assert p.transports == d.transports == ("cuda", "staged-shm", "staged-tcp")
        ticket = p.lease([[3, 4, 9], [1]])
        stats = await d.pull(ticket, [[7, 8, 0], [2]])
        assert stats.transport == "cuda"
    for index, ref in enumerate(source.grids):
        size = ref.grid.block_bytes
        pairs = [(3, 7), (4, 8), (9, 0)] if ref.grid.group == 0 else [(1, 2)]
        for there, here in pairs:
            got = target.chunk(target.arrays, index, here, 0, size)
            assert (got == source.chunk(source.arrays, index, there, 0, size)).all()


async def test_memory_of_the_host_is_served_as_if_there_were_no_gpu() -> None:
    assert CudaTransport.probe({}) is None
    async with Agent(Config()) as agent:
        agent.register(Arena(MIXED, 1).regions)
        assert "cuda" not in agent.transports
        assert "shm" in agent.transports


async def test_memory_that_it_does_not_reach_is_refused_with_what_to_name() -> None:
    regions = [dataclasses.replace(region, kind=MemoryKind.NPU) for region in Arena(MIXED, 1).regions]
    async with Agent(Config(transport=["cuda"])) as agent:
        with pytest.raises(TransportUnavailable, match="does not reach npu memory: name a staged one"):
            agent.register(regions)


@pytest.mark.parametrize(("transport", "cancelled"), [("cuda", False), ("cuda", True), ("staged-shm", False)])
async def test_closing_gives_no_block_back_that_a_stuck_gpu_may_write_to(transport: str, cancelled: bool) -> None:
    source, target = Arena(MIXED, 1, GPU), Arena(MIXED, 2, GPU)
    async with Agent(Config(transport=[transport]), name="P") as p, Agent(Config(transport=[transport]), name="D") as d:
        p.register(source.regions)
        d.register(target.regions)
        await d.pull(p.lease([[3, 4, 9], [1]]), [[7, 8, 0], [2]])
        ticket = p.lease([[3, 4, 9], [1]])
        # Of staged, P's side is done by then: the GPU is stuck while it writes to D's blocks.
        faults("stream:*=~9000" if transport == "cuda" else ";".join(f"stream:{n}=~9000" for n in (4, 5, 6)))
        pull = asyncio.create_task(d.pull(ticket, [[7, 8, 0], [2]]))
        await asyncio.sleep(1.0)
        if cancelled:
            pull.cancel()
        await d.close()
        with pytest.raises(Abandoned, match="never use them again") as caught:
            await pull
        assert caught.value.failed_blocks == ()
        assert d.core.counters["transfers_abandoned"] == 1
