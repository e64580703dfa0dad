"""Whose memory can be read from where, and what is said where it cannot. Not run on hardware."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_connector.errors import TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region
from pd_connector.testing.arena import GEOMETRIES, Arena, Placed
from pd_connector.testing.owner_process import LocalOwner, ProcessOwner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport import rdma
from pd_connector.transport.base import Status
from pd_connector.transport.cuda import CudaTransport
from pd_connector.transport.staged import StagedVerbs
from pd_connector.transport.verbs import VerbsTransport

from .device import GPU, context, gpu, library, things

ROOT = Path(__file__).resolve().parents[2]


def second(num_bytes: int) -> Placed:
    return gpu(num_bytes, 1)


SECOND = f"tests.cuda_emulated.{__name__.rpartition('.')[2]}:{second.__name__}"


@pytest.fixture
def elsewhere() -> Iterator[ProcessOwner]:
    owner = ProcessOwner("cuda", {}, "mixed", SEED, GPU)
    yield owner
    owner.close()


@pytest.fixture
def apart() -> Iterator[None]:
    library().emu_apart(1)
    yield
    library().emu_apart(0)


def test_memory_that_cannot_be_exported_is_refused_with_the_remedy() -> None:
    library().emu_exportable(0)
    try:
        arena = Arena(GEOMETRIES["mixed"], SEED, GPU)
    finally:
        library().emu_exportable(1)
    transport = CudaTransport("owner", {})
    try:
        with pytest.raises(TransportUnavailable, match="expandable_segments"):
            transport.register(arena.regions)
    finally:
        transport.close()


def test_memory_of_two_gpus_is_refused() -> None:
    grid = BlockGrid(0, 0, 0, 64, 64, 1)
    placed = [gpu(64), second(64)]
    transport = CudaTransport("owner", {})
    try:
        with pytest.raises(TransportUnavailable, match="GPU 0 and on GPU 1"):
            transport.register([Region(p.address, 64, (grid,), MemoryKind.CUDA) for p in placed])
    finally:
        transport.close()


def test_another_host_and_another_container_are_told_apart() -> None:
    transport = CudaTransport("owner", {})
    try:
        described = transport.describe()
        assert transport.can_reach(described) is None
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = described.index(file.read(36).encode())
        other = described[:boot] + b"x" + described[boot + 1 :]
        assert "another host" in str(transport.can_reach(other))
        other = described[: boot + 40] + bytes(8) + described[boot + 48 :]
        assert "pid namespace" in str(transport.can_reach(other))
    finally:
        transport.close()


def test_from_one_gpu_to_another(elsewhere: ProcessOwner) -> None:
    pair = Pair(CudaTransport("reader", {}), elsewhere, "mixed", SECOND)
    try:
        pair.settle()
    finally:
        pair.reader.close()


def test_an_agent_stays_with_its_gpu() -> None:
    transport = CudaTransport("agent", {})
    try:
        transport.register(Arena(GEOMETRIES["mixed"], SEED, GPU).regions)
        transport.unregister()
        with pytest.raises(TransportUnavailable, match="memory on GPU 1: this agent's was on GPU 0"):
            transport.register(Arena(GEOMETRIES["mixed"], SEED, SECOND).regions)
        transport.register(Arena(GEOMETRIES["mixed"], SEED, GPU).regions)
    finally:
        transport.close()


def test_from_one_gpu_to_another_in_one_process_without_kernels_on_the_peer() -> None:
    owner = LocalOwner(CudaTransport("owner", {}), "big", SEED, GPU)
    pair = Pair(CudaTransport("reader", {}), owner, "big", SECOND)
    try:
        pair.settle()
        assert library().emu_calls(b"cuLaunchKernel") == 0
    finally:
        pair.reader.close()
        owner.close()


@pytest.mark.usefixtures("apart")
def test_gpus_that_do_not_reach_each_other_are_said_so(elsewhere: ProcessOwner) -> None:
    reader = CudaTransport("reader", {})
    target = Arena(GEOMETRIES["mixed"], SEED, SECOND)
    try:
        reader.register(target.regions)
        # The owner sees both; which one its memory is on shows when it is opened.
        assert reader.can_reach(elsewhere.describe()) is None
        reader.connect("owner", elsewhere.describe(), 1)
        ended = []
        while not ended:
            ended = reader.poll(1)
        assert ended[0].status is Status.PEER_LOST
        assert "topo" in ended[0].detail
        hidden = elsewhere.describe()
        assert bytes([0xE1]) * 16 in hidden
        only_first = hidden.replace(bytes([0xE1]) * 16, bytes([0xE0]) * 16)
        assert "topo" in str(reader.can_reach(only_first))
    finally:
        reader.close()


def test_readers_of_one_process_share_what_they_open(elsewhere: ProcessOwner) -> None:
    before = things()["opened"]
    pairs = [Pair(CudaTransport(f"reader{n}", {}), elsewhere, "mixed", GPU) for n in range(2)]
    try:
        for pair in pairs:
            pair.settle()
        regions = len(GEOMETRIES["mixed"])
        assert things()["opened"] == before + regions
        assert library().emu_calls(b"cuIpcOpenMemHandle_v2") == regions
        pairs[0].reader.close()
        pairs[1].settle()
        assert things()["opened"] == before + regions
    finally:
        for pair in pairs:
            pair.reader.close()
    assert things()["opened"] == before


def test_the_callers_context_stays_its_own() -> None:
    cuda, found = library(), ctypes.c_void_p()
    arena = Arena(GEOMETRIES["mixed"], SEED, GPU)
    for mine in (context(1), None):
        cuda.cuCtxSetCurrent(mine)
        transport = CudaTransport("owner", {})
        transport.register(arena.regions)
        transport.close()
        cuda.cuCtxGetCurrent(ctypes.byref(found))
        assert found.value == mine


def test_rdma_devices_near_the_gpu_are_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless somebody said which, and only where this host knows the GPU's place."""
    regions, address = Arena(GEOMETRIES["mixed"], SEED, GPU).regions, "0000:3b:00.0"
    monkeypatch.setattr(rdma, "PCI", tmp_path)
    monkeypatch.setenv("CUDA_EMU_PCI", address.upper())
    assert VerbsTransport.suit({}, regions) == {}
    (tmp_path / address).mkdir()
    assert VerbsTransport.suit({"rails": 2}, regions) == {"rails": 2, "near": address}
    assert VerbsTransport.suit({"near": "0000:01:00.0"}, regions) == {"near": "0000:01:00.0"}
    assert VerbsTransport.suit({}, Arena(GEOMETRIES["mixed"], SEED).regions) == {}
    assert StagedVerbs.suit({"slots": 4}, regions) == {"slots": 4, "inner": {"near": address}}
    monkeypatch.setenv("CUDA_EMU_DEVICES", "0")
    assert VerbsTransport.suit({}, regions) == {}


def test_without_a_gpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMU_DEVICES", "0")
    assert "no GPU" in str(CudaTransport.probe({}))


def test_the_check_for_real_machines() -> None:
    """It is for real GPUs; here it shows that it runs, in both outcomes."""
    command = [sys.executable, str(ROOT / "scripts" / "check_cuda.py"), "--blocks", "8", "--reader", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every byte is right") == 2
    environment["CUDA_EMU_DEVICES"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no such GPU" in done.stderr
