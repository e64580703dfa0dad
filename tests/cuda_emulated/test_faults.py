"""A driver that fails at every call in turn: every read ends, in words, and nothing stays behind. Not run on
hardware."""

from __future__ import annotations

import gc
import random
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pd_connector.errors import TransportUnavailable
from pd_connector.testing.arena import GEOMETRIES, POISON, Arena
from pd_connector.testing.owner_process import LocalOwner, Owner, ProcessOwner
from pd_connector.testing.pair import CAPABILITY, LEASE, SEED, Pair, strided_plan
from pd_connector.transport.base import Completion, Status
from pd_connector.transport.cuda import CudaTransport

from .device import GPU, faults, library, things

FAILS, LOST = 999, 700
"""LOST: what a stream says it says for ever, as drivers do once a context is lost."""
WORDS = re.compile(r"CUDA error (999|700)|not of a GPU")
RELEASES = {"cuMemFree_v2", "cuStreamDestroy_v2", "cuModuleUnload", "cuMemHostUnregister", "cuIpcCloseMemHandle"}
RELEASES |= {"cuDevicePrimaryCtxRelease_v2", "cuCtxGetCurrent", "cuCtxSetCurrent"}
"""What was made stays where its release fails, or cannot be gone about."""
OF_A_READER = (
    *("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2", "cuDeviceCanAccessPeer"),
    *("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuCtxGetCurrent", "cuCtxSetCurrent"),
    *("cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemcpyAsync"),
    *("cuMemcpyBatchAsync", "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamQuery", "cuPointerGetAttribute"),
    *("cuMemGetAddressRange_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuModuleUnload", "cuLaunchKernel", "stream"),
)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Owner]:
    owner = ProcessOwner("cuda", {}, "mixed", SEED, GPU)
    yield owner
    owner.close()


@pytest.fixture(scope="module")
def target() -> Arena:
    return Arena(GEOMETRIES["mixed"], SEED + 1, GPU)


@contextmanager
def reading(owner: Owner, target: Arena, options: dict[str, int] | None = None) -> Iterator[Pair]:
    """A pair that may fail to come about, and is not connected yet."""
    reader = CudaTransport("reader", options or {})
    try:
        yield Pair(reader, owner, "mixed", target, connected=False)
    finally:
        reader.close()


def outcome(owner: Owner, target: Arena) -> Completion:
    """Of the first operation that failed, or the last one."""
    with reading(owner, target) as pair:
        completion = pair.wait(pair.connect())
        rng = random.Random(SEED)
        for plan in (pair.blocks(range(48)), pair.blocks(range(20), group=1), strided_plan(rng, pair.target.grids)):
            if completion.status is not Status.DONE:
                break
            expected = pair.target.expect(plan, pair.source, pair.target.arrays)
            completion = pair.wait(pair.read(plan))
            assert completion.status is not Status.DONE or pair.target.same(expected)
    return completion


def fail_at(name: str, nth: int, owner: Owner, target: Arena) -> str:
    before = things()
    faults(f"{name}:{nth}={LOST if name == 'stream' else FAILS}")
    try:
        completion = outcome(owner, target)
        ended = completion.status.value
        assert completion.status is Status.DONE or completion.detail
        assert completion.status in (Status.DONE, Status.ERROR, Status.PEER_LOST)
    except TransportUnavailable as error:
        ended = str(error)
    finally:
        faults("")
    assert ended in ("done", "error", "peer_lost") or WORDS.search(ended)
    if name not in RELEASES:
        assert things() == before, f"{name} {nth}: {ended}"
    return ended


def test_a_session_without_faults_uses_what_the_faults_are_in(elsewhere: Owner, target: Arena) -> None:
    before = things()
    assert outcome(elsewhere, target).status is Status.DONE
    unused = {name for name in OF_A_READER if not library().emu_calls(name.encode())}
    assert unused <= {"cuDeviceCanAccessPeer"}  # one GPU is enough to be reached
    assert things() == before


@pytest.mark.parametrize("name", OF_A_READER)
def test_a_call_that_fails_at_the_reader(name: str, elsewhere: Owner, target: Arena) -> None:
    for nth in (1, 2, 3, 5, 8):
        fail_at(name, nth, elsewhere, target)
    assert outcome(elsewhere, target).status is Status.DONE


@pytest.mark.parametrize("name", OF_A_READER)
def test_a_call_that_fails_at_the_owner(name: str) -> None:
    memory, before = Arena(GEOMETRIES["mixed"], SEED, GPU), things()
    for nth in (1, 2, 3, 5):
        faults(f"{name}:{nth}={LOST if name == 'stream' else FAILS}")
        owner, words = None, ""
        try:
            owner = CudaTransport("owner", {})
            owner.register(memory.regions)
        except TransportUnavailable as error:
            words = str(error)
        finally:
            if owner is not None:
                owner.close()
            faults("")
        assert not words or WORDS.search(words)
        if name not in RELEASES:
            assert things() == before, (name, nth)


def test_every_copy_fails(elsewhere: Owner, target: Arena) -> None:
    before = things()
    faults("stream:*=700")
    completion = outcome(elsewhere, target)
    assert completion.status is Status.ERROR
    assert "restart this process" in completion.detail
    assert things() == before


def test_a_slow_gpu_is_an_error_once_it_is_quiet(elsewhere: Owner, target: Arena) -> None:
    with reading(elsewhere, target, {"transfer_ms": 50}) as pair:
        assert pair.wait(pair.connect()).status is Status.DONE
        faults("stream:*=~300")
        completion = pair.wait(pair.read(pair.blocks(range(48))))
        assert completion.status is Status.ERROR
        assert "longer than 50 ms" in completion.detail
        faults("")
        target.poison()
        pair.pump(0.5)
        assert all((array == POISON).all() for array in target.arrays), "written after its end"
        pair.settle()


def test_a_stuck_gpu_holds_no_close(elsewhere: Owner) -> None:
    """What it may still write to stays, although nobody knows it any more."""
    target = Arena(GEOMETRIES["mixed"], SEED + 1, GPU)
    kept = [weakref.ref(region.keepalive) for region in target.regions]
    with reading(elsewhere, target, {"transfer_ms": 50}) as pair:
        assert pair.wait(pair.connect()).status is Status.DONE
        faults("stream:*=~2000")
        pair.read(pair.blocks(range(48)))
        pair.pump(0.2)
    left = things()
    assert left["streams"] > 0, "a stream that the GPU may still use is left alone"
    assert left["opened"] >= len(kept), "and so is the owner's memory"
    del target, pair
    gc.collect()
    assert all(each() is not None for each in kept)


@pytest.mark.parametrize("code", [214, 220, 226, 719])
def test_what_is_said_for_ever_ends_a_read_at_once(elsewhere: Owner, target: Arena, code: int) -> None:
    """Of a context that is lost: nothing of it is under way any more."""
    with reading(elsewhere, target) as pair:
        assert pair.wait(pair.connect()).status is Status.DONE
        faults(f"stream:*={code}")
        ended = pair.wait(pair.read(pair.blocks(range(8))))
        assert ended.status is Status.ERROR
        assert f"CUDA error {code}" in ended.detail


def test_a_gpu_that_is_asked_in_vain_is_asked_again(elsewhere: Owner, target: Arena) -> None:
    """An error that says nothing of what is under way ends no read before its copies."""
    with reading(elsewhere, target) as pair:
        assert pair.wait(pair.connect()).status is Status.DONE
        faults("stream:*=~400;" + ";".join(f"cuStreamQuery:{nth}=900" for nth in range(1, 9)))
        completion = pair.wait(pair.read(pair.blocks(range(4))))
        assert completion.status is Status.ERROR
        assert "CUDA error 900" in completion.detail
        target.poison()
        pair.pump(1.0)
        assert all((array == POISON).all() for array in target.arrays), "written after its end"


def test_a_driver_without_batches(elsewhere: Owner, target: Arena) -> None:
    faults("cuMemcpyBatchAsync:*=801")
    assert outcome(elsewhere, target).status is Status.DONE
    assert library().emu_calls(b"cuMemcpyBatchAsync") < 10, "asked again and again"


def test_a_driver_that_does_not_take_the_kernel(elsewhere: Owner, target: Arena) -> None:
    faults("cuModuleLoadData:*=218")
    assert outcome(elsewhere, target).status is Status.DONE
    assert library().emu_calls(b"cuLaunchKernel") == 0


def test_an_owner_that_registers_again() -> None:
    owner = LocalOwner(CudaTransport("owner", {}), "mixed", SEED, GPU)
    pair = Pair(CudaTransport("reader", {}), owner, "mixed", GPU)
    try:
        pair.settle()
        owner.transport.unregister()
        pair.source = Arena(GEOMETRIES["mixed"], SEED + 7, GPU)
        owner.transport.register(pair.source.regions)
        owner.grant(LEASE, CAPABILITY, pair.all_blocks())
        plan = pair.blocks(range(48))
        expected = pair.target.expect(plan, pair.source, pair.target.arrays)
        assert pair.wait(pair.read(plan)).status is Status.DONE
        assert pair.target.same(expected)
    finally:
        pair.reader.close()
        owner.close()
