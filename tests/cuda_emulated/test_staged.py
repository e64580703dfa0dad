"""Memory of emulated GPUs through pinned host memory, over any wire. Not run on hardware."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pd_connector.errors import TransportUnavailable
from pd_connector.plan import CopyPlan
from pd_connector.testing.arena import GEOMETRIES, POISON, Arena
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair, strided_plan
from pd_connector.transport import staged
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.staged import StagedShm, StagedTcp

from .device import GPU, faults, library

ROOT = Path(__file__).resolve().parents[2]
CALLS = (
    *("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent"),
    *("cuMemHostRegister_v2", "cuMemAlloc_v2", "cuMemcpyAsync", "cuMemcpyBatchAsync", "cuStreamCreate"),
    *("cuStreamQuery", "cuPointerGetAttribute", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "stream"),
)
NEED_NOT_WORK = {"cuMemAlloc_v2", "cuMemcpyBatchAsync", "cuModuleLoadData", "cuModuleGetFunction"}
"""Without these the copy engine does it piece by piece."""


@pytest.mark.slow
class TestStagedShm(TransportConformance):
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return StagedShm(agent, {})


@pytest.mark.slow
class TestStagedTcpBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-tcp", {})
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})


def outcome(owner: Arena, target: Arena, plan: CopyPlan) -> tuple[str, bool]:
    """What was said of one read between fresh agents, and whether all bytes are right."""
    made: list[Transport] = []
    try:
        for name in ("owner", "reader"):
            made.append(StagedShm(name, {}))
        over = Pair(made[1], LocalOwner(made[0], "mixed", SEED, owner), "mixed", target, connected=False)
        assert over.wait(over.connect()).status is Status.DONE
        expected = over.target.expect(plan, over.source, over.target.snapshot())
        ended = over.wait(over.read(plan))
        return ended.detail, ended.status is Status.DONE and over.target.same(expected)
    except TransportUnavailable as error:
        return str(error), False
    finally:
        for transport in made:
            transport.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails(name: str) -> None:
    """Done and whole, or an error in words; the next agents find everything well."""
    arenas = [Arena(GEOMETRIES["mixed"], SEED + n, GPU) for n in range(2)]
    plan, failed = strided_plan(random.Random(SEED), arenas[1].grids), 0
    for nth in (1, 2, 3, 5, 8):
        code = 700 if name == "stream" else 999  # what a stream says it says for ever
        faults(f"{name}:{nth}={code}")
        words, whole = outcome(*arenas, plan)
        assert whole or f"CUDA error {code}" in words or "not of a GPU" in words, words
        failed += not whole
    faults("")
    assert outcome(*arenas, plan) == ("", True)
    assert failed or name in NEED_NOT_WORK | {"cuPointerGetAttribute"}


@pytest.fixture
def pair() -> Pair:
    owner = LocalOwner(StagedShm("owner", {"slots": 1}), "mixed", SEED, GPU)
    return Pair(StagedShm("reader", {"slots": 1}), owner, "mixed", GPU)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_gpu_that_takes_longer_than_anybody_waits(pair: Pair) -> None:
    """Whatever becomes of the read, nothing is written after its end, and no slot is used twice at once."""
    plan = pair.blocks(range(8))
    faults("stream:*=~11000")
    tag = pair.read(plan)
    pair.pump(1.0)
    pair.reader.cancel(tag)
    end = time.monotonic() + 30
    while tag not in pair.ended and time.monotonic() < end:
        pair.pump(0.1)
    assert pair.ended[tag].status is Status.CANCELLED
    pair.target.poison()
    faults("")
    end = time.monotonic() + 12
    while time.monotonic() < end:
        assert all((array == POISON).all() for array in pair.target.arrays), "written after its end"
        time.sleep(0.05)
    pair.settle()
    pair.reader.close()
    pair.owner.close()


def test_closing_while_a_gpu_is_stuck_keeps_what_it_uses(pair: Pair) -> None:
    kept = len(staged._abandoned)
    faults("stream:*=~9000")
    pair.read(pair.blocks(range(8)))
    pair.pump(0.5)
    pair.reader.close()
    pair.owner.close()
    assert isinstance(pair.owner, LocalOwner)
    assert [pool for pool, _ in staged._abandoned[kept:]] == [pair.owner.transport._pool]  # type: ignore[attr-defined]
    assert library().cuMemHostUnregister(ctypes.c_void_p(pair.owner.transport._pool.region.address)) == 0, (
        "still pinned"
    )


LEAVES = """
from tests.cuda_emulated.test_staged import GPU, SEED, LocalOwner, Pair, StagedShm, faults
owner = LocalOwner(StagedShm("owner", {"slots": 1}), "mixed", SEED, GPU)
pair = Pair(StagedShm("reader", {"slots": 1}), owner, "mixed", GPU)
faults("stream:*=~120000")
pair.read(pair.blocks(range(8)))
pair.pump(0.5)
pair.reader.close()
owner.close()
assert owner.transport.abandoned
"""


def test_a_stuck_gpu_keeps_no_process_from_ending() -> None:
    subprocess.run([sys.executable, "-c", LEAVES], check=True, timeout=60, cwd=ROOT)
