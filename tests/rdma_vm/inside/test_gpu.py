"""Reads from and into memory of a GPU by RDMA devices. The verbs are real, the GPU is emulated: not run on hardware.

Nobody but those who were given its dma-buf can touch the memory: an access by the processor is a crash."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from pd_connector import Agent, Config, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region
from pd_connector.plan import CopyPlan
from pd_connector.testing.arena import GEOMETRIES, MIXED, POISON, Arena
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair, strided_plan
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.verbs import VerbsTransport
from tests.cuda_emulated import device
from tests.cuda_emulated.device import GPU, library

from .gpu import HERE, LIBRARY, only_by_address

pytestmark = pytest.mark.skipif(not HERE, reason=f"LD_LIBRARY_PATH={LIBRARY.parent} is needed")

COPIES = (b"cuMemcpyAsync", b"cuMemcpyBatchAsync", b"cuLaunchKernel")
NOTHING_ORDERED, FOR_ITSELF = 0, 100
BY_HOST = 1


class TestVerbsWithGpu(TransportConformance):
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {})


class TestVerbsWithGpuBetweenProcesses(ProcessConformance):
    owner_spec = ("verbs", {})
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"max_mr_bytes": 20480})


class TestVerbsFromGpuToHost(ProcessConformance):
    owner_spec = ("verbs", {})
    memory = GPU

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {})


class TestVerbsThatWriteFromHostToGpu(ProcessConformance):
    owner_spec = ("verbs", {})
    target_memory = GPU

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"wire_verb": "write"})


@pytest.fixture(autouse=True)
def stays() -> Iterator[set[str]]:
    """Of what a transport makes, all is given back but what a test names here."""
    for number in (0, 1):
        device.context(number)
    device.faults("")
    before, named = device.things(), {"allocations"}
    yield named
    device.faults("")
    library().emu_rdma_writes(2 * FOR_ITSELF, BY_HOST)
    assert {name for name, count in device.things().items() if count > before[name]} <= named


@pytest.fixture
def pair() -> Iterator[Pair]:
    owner = LocalOwner(VerbsTransport("owner", {}), "mixed", SEED, GPU)
    over = Pair(VerbsTransport("reader", {}), owner, "mixed", GPU)
    yield over
    over.reader.close()
    owner.close()


def calls(*names: bytes) -> int:
    return sum(library().emu_calls(name) for name in names)


def whole(over: Pair, plan: CopyPlan) -> bool:
    expected = over.target.expect(plan, over.source, over.target.snapshot())
    assert over.wait(over.read(plan)).status is Status.DONE
    return over.target.same(expected)


def test_blocks_are_moved_by_rdma_devices_alone(pair: Pair) -> None:
    """Of both sides' registrations as dma-bufs; neither GPU copies anything. Short runs it puts in their places."""
    assert isinstance(pair.reader, VerbsTransport)
    assert pair.reader.counters()["dma_bufs"] == len(GEOMETRIES["mixed"])
    assert whole(pair, pair.blocks(range(0, 48, 2), range(1, 48, 2)))
    assert calls(*COPIES) == 0
    assert whole(pair, strided_plan(random.Random(SEED), pair.target.grids))
    assert calls(*COPIES) > 0


def test_a_driver_that_gives_no_dma_bufs_beside_a_peer_memory_module() -> None:
    with only_by_address():
        owner = LocalOwner(VerbsTransport("owner", {}), "mixed", SEED, GPU)
        over = Pair(VerbsTransport("reader", {}), owner, "mixed", GPU)
    assert isinstance(over.reader, VerbsTransport)
    assert over.reader.counters()["dma_bufs"] == 0
    assert whole(over, over.blocks(range(0, 48, 2), range(1, 48, 2)))
    assert whole(over, strided_plan(random.Random(SEED), over.target.grids))
    over.reader.close()
    owner.close()


def test_memory_that_no_rdma_device_takes_is_refused_in_words() -> None:
    arena = Arena(GEOMETRIES["mixed"], SEED, GPU)
    device.faults("cuMemGetHandleForAddressRange:*=801")
    transport = VerbsTransport("reader", {})
    with pytest.raises(
        TransportUnavailable, match=r"as a dma-buf: .*CUDA error 801.*by its address: .*module.*stage it"
    ):
        transport.register(arena.regions)
    device.faults("")
    transport.register(arena.regions)
    transport.close()


async def test_auto_does_without() -> None:
    arena = Arena(MIXED, SEED, GPU)
    device.faults("cuMemGetHandleForAddressRange:*=801")
    async with Agent(Config()) as agent:
        agent.register(arena.regions)
        assert agent.transports == ("cuda", "staged-shm", "staged-verbs", "staged-tcp")


async def test_an_agent_that_needs_only_one_gpu_and_one_rdma_device() -> None:
    source, target = Arena(MIXED, 1, GPU), Arena(MIXED, 2, GPU)
    config = Config(transport=["verbs"])
    async with Agent(config, name="P") as p, Agent(config, name="D") as d:
        p.register(source.regions)
        d.register(target.regions)
        stats = await d.pull(p.lease([[3, 4, 9], [1]]), [[7, 8, 0], [2]])
        assert stats.transport == "verbs"
    for index, ref in enumerate(source.grids):
        size = ref.grid.block_bytes
        for there, here in [(3, 7), (4, 8), (9, 0)] if ref.grid.group == 0 else [(1, 2)]:
            got = target.chunk(target.arrays, index, here, 0, size)
            assert (got == source.chunk(source.arrays, index, there, 0, size)).all()


def test_memory_of_the_host_beside_that_of_a_gpu() -> None:
    """Each region is read into where it lies."""
    grids = GEOMETRIES["mixed"]
    on_gpu, on_host = Arena(grids, SEED + 1, GPU), Arena(grids, SEED + 1)
    mixed = [
        (gpu if index % 2 else host)
        for index, (gpu, host) in enumerate(zip(on_gpu.regions, on_host.regions, strict=True))
    ]
    owner = LocalOwner(VerbsTransport("owner", {}), "mixed", SEED, GPU)
    over = Pair(VerbsTransport("reader", {}), owner, "mixed", GPU)
    over.target = on_gpu
    over.target.arrays[::2] = on_host.arrays[::2]
    over.reader.register(mixed)
    for plan in (over.blocks(range(48)), strided_plan(random.Random(SEED), over.target.grids)):
        assert whole(over, plan)
    over.reader.close()
    owner.close()


def test_a_gpu_that_must_be_told_to_look() -> None:
    """Where what RDMA devices write is not ordered for the GPU, no read is done before a flush, and none is without."""
    library().emu_rdma_writes(NOTHING_ORDERED, BY_HOST)
    owner = LocalOwner(VerbsTransport("owner", {}), "mixed", SEED, GPU)
    over = Pair(VerbsTransport("reader", {}), owner, "mixed", GPU)
    assert whole(over, over.blocks(range(48)))
    assert calls(b"cuFlushGPUDirectRDMAWrites") > 0
    device.faults("cuFlushGPUDirectRDMAWrites:*=700")
    ended = over.wait(over.read(over.blocks(range(48))))
    assert ended.status is Status.ERROR
    assert "not visible to the GPU" in ended.detail
    device.faults("")
    over.settle()
    over.reader.close()
    owner.close()


def test_a_gpu_that_needs_no_flush(pair: Pair) -> None:
    pair.settle()
    assert calls(b"cuFlushGPUDirectRDMAWrites") == 0


def test_a_gpu_that_cannot_be_told_is_refused() -> None:
    library().emu_rdma_writes(NOTHING_ORDERED, 0)
    transport = VerbsTransport("reader", {})
    with pytest.raises(TransportUnavailable, match="nothing tells when GPU 0 sees"):
        transport.register(Arena(GEOMETRIES["mixed"], SEED, GPU).regions)
    transport.close()


def test_memory_of_two_gpus_is_refused() -> None:
    grid = BlockGrid(0, 0, 0, 64, 64, 1)
    placed = [device.gpu(64, number) for number in (0, 1)]
    transport = VerbsTransport("owner", {})
    with pytest.raises(TransportUnavailable, match="GPU 0 and on GPU 1"):
        transport.register([Region(p.address, 64, (grid,), MemoryKind.CUDA) for p in placed])
    transport.close()


def test_a_gpu_that_does_not_put_runs_in_their_places(pair: Pair) -> None:
    """It is an error, and only once nothing writes any more."""
    plan = strided_plan(random.Random(SEED), pair.target.grids)
    device.faults("stream:*=700")
    ended = pair.wait(pair.read(plan))
    assert ended.status is Status.ERROR
    assert "restart this process" in ended.detail
    device.faults("stream:*=~3500")
    ended = pair.wait(pair.read(plan))
    assert ended.status is Status.ERROR
    assert "longer than 3000 ms" in ended.detail
    device.faults("")
    pair.target.poison()
    pair.pump(0.5)
    assert all((array == POISON).all() for array in pair.target.arrays), "written after its end"
    assert whole(pair, plan)


def test_a_stuck_gpu_holds_no_close(pair: Pair, stays: set[str]) -> None:
    stays |= {"streams", "pinned", "modules", "contexts"}
    device.faults("stream:*=~8000")
    rng = random.Random(SEED)
    for _ in range(6):  # all in flight: the GPU's patience is for one of them
        pair.read(strided_plan(rng, pair.target.grids))
    pair.pump(1.0)
    start = time.monotonic()
    pair.reader.close()
    assert time.monotonic() - start < 5
    assert pair.reader.abandoned
    assert device.things()["streams"] > 0, "a stream that the GPU may still use is left alone"


CALLS = (
    *("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"),
    *("cuCtxGetCurrent", "cuCtxSetCurrent", "cuPointerGetAttribute", "cuMemGetHandleForAddressRange"),
    *("cuMemHostRegister_v2", "cuMemAlloc_v2", "cuMemcpyAsync", "cuMemcpyBatchAsync", "cuStreamCreate"),
    *("cuStreamQuery", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuFlushGPUDirectRDMAWrites"),
)


def outcome(owner: LocalOwner, plan: CopyPlan, target: Arena) -> tuple[str, bool]:
    """What was said of a fresh reader's read, and whether the bytes are all there."""
    try:
        reader = VerbsTransport("reader", {})
    except TransportUnavailable as error:
        return str(error), False
    try:
        over = Pair(reader, owner, "mixed", target, connected=False)
        assert over.wait(over.connect()).status is Status.DONE
        expected = target.expect(plan, owner.arena, target.snapshot())
        ended = over.wait(over.read(plan))
        return ended.detail, ended.status is Status.DONE and target.same(expected)
    except TransportUnavailable as error:
        return str(error), False
    finally:
        reader.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_the_driver_that_fails(name: str, stays: set[str]) -> None:
    """Done and whole, or an error in words; the next reader finds everything well."""
    stays |= {"contexts", "modules", "streams", "pinned"} if name.startswith("cuCtx") else set()
    library().emu_rdma_writes(NOTHING_ORDERED, BY_HOST)
    owner = LocalOwner(VerbsTransport("owner", {}), "mixed", SEED, GPU)
    target = Arena(GEOMETRIES["mixed"], SEED + 1, GPU)
    plan, failed = strided_plan(random.Random(SEED), target.grids), 0
    for nth in (1, 2, 3, 5, 8):
        device.faults(f"{name}:{nth}=999")
        words, whole_ = outcome(owner, plan, target)
        assert whole_ or "999" in words or "not of a GPU" in words or "nothing tells" in words, words
        failed += not whole_
    device.faults("")
    assert outcome(owner, plan, target) == ("", True)
    assert failed or name in {"cuMemAlloc_v2", "cuModuleLoadData", "cuModuleGetFunction", "cuMemcpyBatchAsync"}
    owner.close()
