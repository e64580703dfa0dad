"""How bytes of one kind of memory travel in these tests. Not run on hardware."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from pd_connector.memory import MemoryKind, Region, order_grids
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import LeaseId, Status, Transport
from pd_connector.transport.hixl import HixlTransport
from pd_connector.transport.inproc import InprocTransport

_LEASE = LeaseId(1, 1)
_CAPABILITY = b"tensor-forms-016"
_SECONDS = 20.0


def transport_for(kind: MemoryKind) -> Callable[[str], Transport]:
    """For an agent of that name."""
    if kind is MemoryKind.NPU:
        return lambda agent: HixlTransport(agent, {})
    return lambda agent: InprocTransport(agent, {})


def carry(
    make: Callable[[str], Transport], plans: Sequence[CopyPlan], source: Sequence[Region], target: Sequence[Region]
) -> None:
    """Read all plans from one rank's memory into another's. Raises RuntimeError where one does not end as DONE."""
    owner, reader = make("owner"), make("reader")
    try:
        owner.register(source)
        reader.register(target)
        every = {ref.grid.group: np.arange(ref.grid.num_blocks, dtype=np.uint32) for ref in order_grids(source)}
        owner.grant(_LEASE, _CAPABILITY, every)
        reader.connect("owner#1", owner.describe(), 1)
        _settle(reader, 1)
        for tag, plan in enumerate(plans, 2):
            reader.post_read("owner#1", _LEASE, _CAPABILITY, plan, tag)
        _settle(reader, len(plans))
    finally:
        reader.close()
        owner.close()


def _settle(reader: Transport, count: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while count:
        for ended in reader.poll(16):
            count -= 1
            if ended.status is not Status.DONE:
                raise RuntimeError(f"{ended.status}: {ended.detail}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count} operations did not end within {_SECONDS} s")
