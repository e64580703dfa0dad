"""The host memory that staged bytes pass through: slots to serve from, then slots to read into, in one shared pool."""

from __future__ import annotations

from collections import deque

from pd_connector.memory import BlockGrid, Pool, Region, shared_pool
from pd_connector.plan import CopyPlan, Pattern, coalesce


class SlotPool:
    """``slots`` of each; all of them are the blocks of one grid, which every agent has alike."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        pool = shared_pool(2 * slots * slot_bytes)
        grid = BlockGrid(0, 0, 0, slot_bytes, slot_bytes, 2 * slots)
        self._pool: Pool | None = pool
        self.region = Region(pool.address, len(pool), (grid,), keepalive=pool)
        self._free = deque(range(slots, 2 * slots))

    def address(self, slot: int) -> int:
        return self.region.address + slot * self.slot_bytes

    def take(self) -> int | None:
        """A slot to read into, or None when all are in use."""
        return self._free.popleft() if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def close(self) -> None:
        """Nobody uses it any more: the memory goes now, not when the collector comes by. Idempotent."""
        if self._pool is not None:
            self._pool = None
            del self.region


def one_slot(theirs: int, ours: int, num_bytes: int) -> CopyPlan:
    """The first bytes of a peer's slot into one of ours."""
    return CopyPlan(coalesce([theirs], [ours]), (Pattern(0, 0, 0, 0, num_bytes),))
