"""Every call of the vendor's libraries fails once, or for ever: a typed end, no wrong byte called right, and the next
agents work. Not run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pd_connector.errors import PDError
from pd_connector.memory import native
from pd_connector.testing.arena import GEOMETRIES, Arena
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.hccl import HcclTransport
from pd_connector.transport.hixl import HixlTransport
from pd_connector.transport.staged import StagedTcp

from .device import ADOPTED, library
from .libraries import Board

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

ACL_INTERNAL, HIXL_FAILED, HIXL_TIMEOUT, HCCL_REMOTE = 507899, 503900, 103901, 21
QUICK = {"transfer_ms": 400}

Make = Callable[[str], Transport]
MAKES: dict[str, Make] = {
    "hixl": lambda agent: HixlTransport(agent, {**QUICK, "link_ms": 400}),
    "hccl": lambda agent: HcclTransport(agent, QUICK),
    "staged": lambda agent: StagedTcp(agent, {}),
}
CALLS = [
    *(
        ("hixl", name, code)
        for name in (
            "HixlInitialize",
            "HixlRegisterMem",
            "HixlDeregisterMem",
            "HixlConnect",
            "HixlDisconnect",
            "HixlTransferSync",
        )
        for code in (HIXL_FAILED, HIXL_TIMEOUT)
    ),
    *(("hccl", name, HCCL_REMOTE) for name in ("HcclGetRootInfo", "HcclCommInitRootInfo", "HcclBatchSendRecv")),
    ("hccl", "HcclCommDestroy", HCCL_REMOTE),
    *(
        (transport, name, ACL_INTERNAL)
        for transport in ("hixl", "hccl", "staged")
        for name in (
            "aclrtSetDevice",
            "aclrtGetCurrentContext",
            "aclrtSetCurrentContext",
            "aclrtMalloc",
            "aclrtCreateStream",
            "aclrtDestroyStream",
            "aclrtHostRegister",
            "aclrtMemcpyAsync",
            "aclrtMemcpyBatchAsync",
            "aclrtMemcpy2dAsync",
            "aclrtSynchronizeStreamWithTimeout",
            "aclrtPointerGetAttributes",
            "stream",
        )
    ),
]


@contextmanager
def failing(fault: str) -> Iterator[None]:
    assert library().emu_faults(fault.encode()) == 0
    try:
        yield
    finally:
        assert library().emu_faults(b"") == 0


def whole(over: Pair) -> bool:
    """A read of everything ends in time whatever happens, and is as planned if it is DONE."""
    plan = over.blocks(range(48), range(48))
    before = over.target.snapshot()
    ended = over.wait(over.read(plan))
    if ended.status is Status.DONE:
        assert over.target.same(over.target.expect(plan, over.source, before))
        return True
    assert len(ended.detail) > 10, ended
    return False


def attempt(owner: Transport, reader: Transport) -> None:
    """Three reads, or less where something fails before: it says so."""
    try:
        served = LocalOwner(owner, "mixed", SEED, ADOPTED)
        target = Arena(GEOMETRIES["mixed"], SEED + 1, ADOPTED)
        over = Pair(reader, served, "mixed", target, connected=False)
        ended = over.wait(over.connect())
    except PDError:
        return
    assert ended.status is Status.DONE or len(ended.detail) > 10
    for _ in range(3 if ended.status is Status.DONE else 0):
        whole(over)


@pytest.mark.parametrize(("transport", "name", "code"), CALLS)
def test_a_call_that_fails(transport: str, name: str, code: int) -> None:
    Board()
    make = MAKES[transport]
    for nth in ("1", "2", "4", "*"):
        owner, reader = make("owner"), make("reader")
        with failing(f"{name}:{nth}={code}"):
            attempt(owner, reader)
        reader.close()
        owner.close()
    # Nothing is left behind that stands in the way of new agents.
    owner, reader = make("owner"), make("reader")
    try:
        assert whole(Pair(reader, LocalOwner(owner, "mixed", SEED, ADOPTED), "mixed", ADOPTED))
    finally:
        reader.close()
        owner.close()
