"""A read ends once nothing of it writes any more, whatever the device and its driver say; only an agent that closes
gives up, says so, and does it once. Not run on hardware."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest

from pd_connector.memory import native
from pd_connector.testing.arena import POISON
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair, strided_plan
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.hccl import HcclTransport
from pd_connector.transport.hixl import HixlTransport

from .device import ADOPTED, library
from .libraries import Board

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

FAILS = 507899
CLOSE_S = 10.0
"""ACL_LAST_MS of csrc/acl.h."""
Make = Callable[[type[Transport]], Pair]


def faults(*each: str) -> None:
    assert library().emu_faults(";".join(each).encode()) == 0


def failing(name: str, calls: range) -> str:
    return ";".join(f"{name}:{call}={FAILS}" for call in calls)


@pytest.fixture
def make() -> Iterator[Make]:
    Board()
    made: list[Pair] = []

    def build(kind: type[Transport]) -> Pair:
        owner = LocalOwner(kind("owner", {"transfer_ms": 400}), "mixed", SEED, ADOPTED)
        made.append(Pair(kind("reader", {"transfer_ms": 400}), owner, "mixed", ADOPTED))
        made[-1].settle()
        return made[-1]

    yield build
    faults("")
    for pair in made:
        pair.reader.close()
        pair.owner.close()


def written(pair: Pair, seconds: float) -> bool:
    """Whether anything writes into the target within this time."""
    pair.target.poison()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not all((array == POISON).all() for array in pair.target.arrays):
            return True
        time.sleep(0.01)
    return False


def test_a_stream_that_cannot_be_made_anew(make: Make) -> None:
    """Without one of its own the copies would be the default stream's, for which nobody waits."""
    pair = make(HixlTransport)
    plan = strided_plan(random.Random(SEED), pair.target.grids)
    faults(failing("aclrtSynchronizeStreamWithTimeout", range(1, 4)))
    assert pair.wait(pair.read(plan)).status is Status.ERROR
    faults("stream:*=~200", f"aclrtCreateStream:1={FAILS}")
    assert pair.wait(pair.read(plan)).status is Status.ERROR
    assert not written(pair, 1.0)
    faults("")
    expected = pair.target.expect(plan, pair.source, pair.target.snapshot())
    assert pair.wait(pair.read(plan)).status is Status.DONE
    assert pair.target.same(expected)


def test_a_stream_that_cannot_be_destroyed_is_asked_again(make: Make) -> None:
    pair = make(HixlTransport)
    plan = strided_plan(random.Random(SEED), pair.target.grids)
    faults(
        "stream:*=~50",
        failing("aclrtSynchronizeStreamWithTimeout", range(1, 10)),
        failing("aclrtDestroyStream", range(1, 10)),
    )
    assert pair.wait(pair.read(plan)).status is Status.ERROR
    assert not written(pair, 1.5)


def test_a_communicator_that_does_not_end_is_waited_for(make: Make) -> None:
    pair = make(HcclTransport)
    faults(
        "stream:*=~1500",
        failing("aclrtSynchronizeStreamWithTimeout", range(1, 12)),
        "HcclCommDestroy:*=21",
        failing("aclrtDestroyStream", range(1, 12)),
    )
    assert pair.wait(pair.read(pair.blocks(range(48)))).status is Status.PEER_LOST
    assert not written(pair, 2.5)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "strided"), [(HixlTransport, True), (HcclTransport, False)])
def test_closing_gives_a_device_up_once_and_says_so(make: Make, kind: type[Transport], strided: bool) -> None:
    pair = make(kind)
    faults("stream:*=~40000")
    rng = random.Random(SEED)
    for _ in range(6):
        pair.read(strided_plan(rng, pair.target.grids) if strided else pair.blocks(range(48)))
    pair.pump(1.0)
    start = time.monotonic()
    pair.reader.close()
    assert time.monotonic() - start < CLOSE_S + 4
    assert pair.reader.abandoned
