"""HIXL's order rules and limits, broken on purpose through our own transport: the documented status comes back as a
typed error in words, or the transport keeps the rule by itself. Not run on hardware. (The statuses: test_engine.)"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region, native
from pd_connector.plan import CopyPlan, Dim, Pattern, coalesce
from pd_connector.testing.arena import GEOMETRIES, Arena
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, LEASE, PEER, SEED, Pair
from pd_connector.transport.base import Completion, Status, Transport
from pd_connector.transport.hccl import HcclTransport
from pd_connector.transport.hixl import HixlTransport
from pd_connector.transport.staged import StagedTcp

from .device import ADOPTED, NPU, adopted, library
from .libraries import Board

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

BLOCK = 4096


@pytest.fixture
def pair() -> Iterator[Pair]:
    owner = LocalOwner(HixlTransport("owner", {}), "mixed", SEED, NPU)
    reader = HixlTransport("reader", {"transfer_ms": 500, "link_ms": 500})
    yield Pair(reader, owner, "mixed", NPU)
    library().emu_faults(b"")
    reader.close()
    owner.close()


def region(blocks: int = 8, kind: MemoryKind = MemoryKind.NPU, device: int = 0, group: int = 0) -> Region:
    placed = adopted(blocks * BLOCK)
    grid = BlockGrid(group, 0, 0, BLOCK, BLOCK, blocks)
    return Region(placed.address, blocks * BLOCK, (grid,), kind, placed.keepalive, device=device)


def outcome(transport: Transport, seconds: float = 20.0) -> Completion:
    end = time.monotonic() + seconds
    while not (ended := transport.poll(1)):
        assert time.monotonic() < end
        time.sleep(0.005)
    return ended[0]


def test_more_than_256_registrations() -> None:
    """103900's neighbour 203900 never comes up: what cannot be registered is refused before, with the remedy."""
    transport = HixlTransport("owner", {})
    try:
        apart = [region(1) for _ in range(300)]
        with pytest.raises(TransportUnavailable, match=r"more than 255 pieces of memory.*fewer tensors"):
            transport.register(apart)
        transport.register(apart[:255])
    finally:
        transport.close()


def test_neighbours_are_registered_as_one() -> None:
    whole = region(600)
    library().emu_faults(b"")
    parts = [
        Region(whole.address + at * BLOCK, BLOCK, (BlockGrid(0, 0, 0, BLOCK, BLOCK, 1),), whole.kind, whole, device=0)
        for at in range(600)
    ]
    transport = HixlTransport("owner", {})
    try:
        transport.register(parts)
        assert library().emu_calls(b"HixlRegisterMem") == 2, "the memory, and the buffers"
    finally:
        transport.close()


def test_memory_that_no_device_has() -> None:
    array = np.zeros(BLOCK, np.uint8)
    strange = Region(array.ctypes.data, BLOCK, (BlockGrid(0, 0, 0, BLOCK, BLOCK, 1),), MemoryKind.NPU, array)
    for make in (HixlTransport, HcclTransport):
        transport = make("owner", {})
        try:
            with pytest.raises(TransportUnavailable, match="does not say which device"):
                transport.register([strange])
        finally:
            transport.close()
    claimed = replace(strange, device=0)
    transport = HixlTransport("owner", {})
    try:
        with pytest.raises(TransportUnavailable, match="HIXL status 103900"):
            transport.register([claimed])
    finally:
        transport.close()


@pytest.mark.parametrize("make", [HixlTransport, HcclTransport, StagedTcp])
def test_memory_of_two_devices(make: type[Transport]) -> None:
    transport = make("owner", {})
    try:
        with pytest.raises(TransportUnavailable, match="devices 0 and 1: an agent serves one"):
            transport.register([region(device=0), region(device=1)])
    finally:
        transport.close()


@pytest.mark.parametrize("make", [HixlTransport, HcclTransport])
def test_memory_of_another_device_than_before(make: type[Transport]) -> None:
    transport = make("owner", {})
    try:
        transport.register([region(device=0)])
        with pytest.raises(TransportUnavailable, match="memory of device 1: this agent's was of device 0"):
            transport.register([region(device=1)])
    finally:
        transport.close()


def test_a_device_that_does_not_exist() -> None:
    for make in (HixlTransport, HcclTransport, StagedTcp):
        transport = make("owner", {})
        try:
            with pytest.raises(TransportUnavailable, match="the device cannot be used: AscendCL error"):
                transport.register([region(device=77)])
        finally:
            transport.close()


def test_a_link_to_nobody() -> None:
    """103901: the owner's service answers, its engine does not."""
    owner = LocalOwner(HixlTransport("owner", {}), "mixed", SEED, ADOPTED)
    described = bytearray(owner.describe())
    at = described.rindex(b":")
    described[at + 1 : described.index(0, at)] = b"1".ljust(described.index(0, at) - at - 1, b"\0")
    reader = HixlTransport("reader", {"link_ms": 300})
    try:
        reader.register(Arena(GEOMETRIES["mixed"], 1, ADOPTED).regions)
        reader.connect(PEER, bytes(described), 1)
        ended = outcome(reader)
        assert ended.status is Status.PEER_LOST
        assert "no link: HIXL status 103901" in ended.detail
        assert "hccn_tool" in ended.detail
    finally:
        reader.close()
        owner.close()


def test_memory_that_is_registered_after_the_link(pair: Pair) -> None:
    """A link does not know it (103900): ours is made anew, for either side."""
    pair.settle()
    for side, arena in ((pair.reader, pair.target), (pair.owner.transport, pair.source)):  # type: ignore[attr-defined]
        more = region(group=9)  # behind all others, so that the plans stay as they are
        connects = library().emu_calls(b"HixlConnect")
        side.register([*arena.regions, more])
        pair.settle()
        assert library().emu_calls(b"HixlConnect") > connects


def test_a_second_link_to_the_same_engine(pair: Pair) -> None:
    """103903 does not come up: whoever reads from an engine shares the link."""
    connects = library().emu_calls(b"HixlConnect")
    pair.reader.connect("the same by another name", pair.owner.describe(), tag := pair.tag())
    assert pair.wait(tag).status is Status.DONE
    assert library().emu_calls(b"HixlConnect") == connects
    pair.reader.disconnect(PEER)
    pair.reader.post_read("the same by another name", LEASE, CAPABILITY, pair.blocks([1, 2]), tag := pair.tag())
    assert pair.wait(tag).status is Status.DONE


@pytest.mark.parametrize("code", [103901, 103902, 503900])
def test_after_a_time_out_the_link_is_taken_down_first(pair: Pair, code: int) -> None:
    library().emu_faults(f"HixlTransferSync:1={code}".encode())
    ended = pair.wait(pair.read(pair.blocks([1])))
    assert ended.status is Status.PEER_LOST
    assert f"the read failed: HIXL status {code}" in ended.detail
    assert library().emu_calls(b"HixlDisconnect") >= 1
    assert pair.wait(pair.connect()).status is Status.DONE
    pair.settle()


def test_while_a_link_cannot_be_taken_down_the_read_does_not_end(pair: Pair) -> None:
    """Late bytes may still come: the destination stays ours until the link is down."""
    library().emu_faults(b"HixlTransferSync:1=103901;HixlDisconnect:*=503900")
    tag = pair.read(pair.blocks([1]))
    for _ in range(30):
        pair.pump(0.03)
    assert tag not in pair.ended
    library().emu_faults(b"")
    assert pair.wait(tag).status is Status.PEER_LOST


def test_an_address_that_is_not_registered_any_more(pair: Pair) -> None:
    """103900 of a transfer: an error of this read, the link lives on."""
    library().emu_faults(b"HixlTransferSync:1=103900")
    ended = pair.wait(pair.read(pair.blocks([1])))
    assert ended.status is Status.ERROR
    assert "HIXL status 103900" in ended.detail
    pair.settle()


def test_an_engine_that_does_not_start() -> None:
    """503900: as where no device is set."""
    transport = HixlTransport("owner", {})
    library().emu_faults(b"HixlInitialize:1=503900")
    try:
        with pytest.raises(TransportUnavailable, match="the engine does not start: HIXL status 503900"):
            transport.register([region()])
    finally:
        library().emu_faults(b"")
        transport.close()


def test_short_runs_go_through_a_buffer_of_the_device(pair: Pair) -> None:
    Board()
    library().emu_faults(b"")
    plan = CopyPlan(coalesce([1, 3], [5, 9]), (Pattern(0, 0, 0, 0, 64, (Dim(16, 128, 64),)),))
    expected = pair.target.expect(plan, pair.source, pair.target.snapshot())
    assert pair.wait(pair.read(plan)).status is Status.DONE
    assert pair.target.same(expected)
    assert library().emu_calls(b"HixlTransferSync") == 1
    assert library().emu_calls(b"aclrtMemcpyAsync") + library().emu_calls(b"aclrtMemcpy2dAsync") >= 2


def test_host_memory_is_not_for_hccl() -> None:
    transport = HcclTransport("owner", {})
    try:
        with pytest.raises(LocalProtocolError, match="memory of npu only"):
            transport.register([region(kind=MemoryKind.HOST)])
    finally:
        transport.close()
