"""A reader and an owner under test, and the plans that try them."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable, Sequence

import numpy as np

from pd_connector.memory import GridRef
from pd_connector.plan import CopyPlan, Dim, Pattern, coalesce, whole_patterns
from pd_connector.testing.arena import GEOMETRIES, POISON, PRIVATE, Arena
from pd_connector.testing.owner_process import Owner
from pd_connector.transport.base import Completion, LeaseId, Status, Transport

DEADLINE_S = 20.0
LEASE = LeaseId(7, 1)
CAPABILITY = b"conformance-0123"
PEER = "owner#1"
SEED = 20240607


IMPOSSIBLE_PLANS = (
    CopyPlan(coalesce([0], [48]), (Pattern(0, 0, 0, 0, 1),)),
    CopyPlan(coalesce([0], [2**32 - 1]), (Pattern(0, 0, 0, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 7, 0, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, -1, 0, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 1, 4096),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, -1, 4),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 0),)),
    CopyPlan(coalesce([0], [0]), (Pattern(-1, 0, 0, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, -1, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 2**70, 0, 1),)),
    CopyPlan(np.array([[2**32 - 1, 0, 2]], np.uint32), (Pattern(0, 0, 0, 0, 1),)),
    CopyPlan(np.array([[0, 0, 48], [0, 0, 1]], np.uint32), (Pattern(0, 0, 0, 0, 1),)),
    CopyPlan(np.array([[0, 0, 2**32 - 1]], np.uint32), (Pattern(0, 0, 0, 0, 1),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(2, 0, 4096),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 4000, 48, (Dim(3, 48, 48),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(0, 1, 1),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(2**40, 2**40, 0),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(2**60, 0, 0),) * 2),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(2**33, 0, 0),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 8, (Dim(3, 8, 4),)),)),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1, (Dim(1, 1, 1),) * 4),)),
    CopyPlan(np.array([[0, 0, 2]], np.uint32), (Pattern(0, 0, 0, 0, 1),), 1, 48),
    CopyPlan(np.array([[0, 0, 3]], np.uint32), (Pattern(0, 0, 0, 0, 1),), 2**31, 1),
    CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 1),), 0, 1),
)
"""Of the mixed geometry: destinations that are not registered, sources that cannot be."""


class Pair:
    """A reader and an owner with known memory; the reader is connected and holds a lease on every block.

    ``memory`` that is read into: what kind, or the arena itself. Not ``connected`` where a test expects that to fail.
    """

    def __init__(
        self, reader: Transport, owner: Owner, geometry: str, memory: str | Arena = PRIVATE, *, connected: bool = True
    ) -> None:
        self.reader, self.owner = reader, owner
        self.source = Arena(GEOMETRIES[geometry], SEED)
        self.target = memory if isinstance(memory, Arena) else Arena(GEOMETRIES[geometry], SEED + 1, memory)
        self._next_tag = 1
        self.ended: dict[int, Completion] = {}
        reader.register(self.target.regions)
        owner.grant(LEASE, CAPABILITY, self.all_blocks())
        assert not connected or self.wait(self.connect()).status is Status.DONE

    def all_blocks(self) -> dict[int, list[int]]:
        return {ref.grid.group: list(range(ref.grid.num_blocks)) for ref in self.source.grids}

    def tag(self) -> int:
        self._next_tag += 1
        return self._next_tag

    def connect(self) -> int:
        tag = self.tag()
        self.reader.connect(PEER, self.owner.describe(), tag)
        return tag

    def fence(self) -> int:
        tag = self.tag()
        self.reader.fence(PEER, tag)
        return tag

    def read(self, plan: CopyPlan, *, lease: LeaseId = LEASE, capability: bytes = CAPABILITY, priority: int = 0) -> int:
        tag = self.tag()
        self.reader.post_read(PEER, lease, capability, plan, tag, priority)
        return tag

    def blocks(self, src: Sequence[int], dst: Sequence[int] | None = None, group: int = 0) -> CopyPlan:
        return CopyPlan(coalesce(src, src if dst is None else dst), whole_patterns(self.target.grids, group))

    def long(self, src: Sequence[int], dst: Sequence[int] | None = None) -> CopyPlan:
        """The same bytes over and over, so that even at the speed of memory there is a middle to do something in."""
        plan = self.blocks(src, dst)
        return CopyPlan(plan.runs, plan.patterns * 6)

    def pump(self, timeout: float = 0.0) -> list[Completion]:
        """Wait for the descriptor, then poll once. A second completion of a tag fails the test."""
        select.select([self.reader.fileno()], [], [], timeout)
        fresh = self.reader.poll(64)
        for completion in fresh:
            assert completion.tag not in self.ended, f"a second completion: {completion}"
            self.ended[completion.tag] = completion
        return fresh

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
            self.pump(0.05)

    def wait(self, *tags: int) -> Completion:
        """All these tags have ended; the last one's completion."""
        self.until(lambda: all(tag in self.ended for tag in tags), f"completion of {tags}")
        return self.ended[tags[-1]]

    def settle(self) -> None:
        """Whatever an earlier read could still bring has come: a whole read later, nothing more to poll."""
        settled = self.wait(self.read(self.blocks([0])))
        assert settled.status is Status.DONE, settled
        while self.pump():
            pass

    def catch(self) -> None:
        """Return in the middle of a read into poisoned memory: its first bytes are there. Spins, not to miss it."""
        first = self.target.chunk(self.target.arrays, 0, 0, 0, 64)
        end = time.monotonic() + DEADLINE_S
        while (first == POISON).all():
            assert time.monotonic() < end, f"no byte was read within {DEADLINE_S} s"
            self.pump()


def random_plan(rng: random.Random, grids: Sequence[GridRef]) -> CopyPlan:
    """Scattered blocks; patterns between any two grids, at any offsets, of any size that fits both."""
    blocks = rng.randint(1, 48)
    patterns = []
    # Patterns with destinations of their own, so that the order of writes cannot matter.
    for dst_grid in rng.sample(range(len(grids)), rng.randint(1, len(grids))):
        src_grid = rng.randrange(len(grids))
        src_size, dst_size = grids[src_grid].grid.block_bytes, grids[dst_grid].grid.block_bytes
        whole = rng.random() < 0.4
        size = min(src_size, dst_size) if whole else rng.randint(1, min(src_size, dst_size))
        patterns.append(
            Pattern(src_grid, dst_grid, rng.randint(0, src_size - size), rng.randint(0, dst_size - size), size)
        )
    if rng.random() < 0.3:
        first = rng.randint(0, 48 - blocks)
        return CopyPlan(coalesce(range(first, first + blocks), range(48 - blocks, 48)), tuple(patterns))
    return CopyPlan(coalesce(rng.sample(range(48), blocks), rng.sample(range(48), blocks)), tuple(patterns))


def strided_plan(rng: random.Random, grids: Sequence[GridRef]) -> CopyPlan:
    """Runs with steps; patterns of up to three dimensions, of runs from one byte to some thousand, in any order on the
    source's side and apart on the destination's."""
    patterns = []
    for dst_grid in rng.sample(range(len(grids)), rng.randint(1, 3)):
        src_grid = rng.randrange(len(grids))
        src_size, dst_size = (grids[grid].grid.block_bytes for grid in (src_grid, dst_grid))
        counts = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
        run = rng.randint(1, max(1, min(src_size, dst_size) // 4 ** len(counts)))
        dims, dst_stride, src_left = [], run + rng.choice((0, 0, rng.randrange(8))), src_size - run
        for count in counts:
            src_stride = rng.randint(0, src_left // max(count - 1, 1))
            src_left -= (count - 1) * src_stride
            dims.append(Dim(count, src_stride, dst_stride))
            dst_stride *= count
        rng.shuffle(dims)
        pattern = Pattern(src_grid, dst_grid, rng.randint(0, src_left), 0, run, tuple(dims))
        if pattern.dst_span <= dst_size:
            patterns.append(pattern)
    src_step, dst_step = rng.randint(1, 4), rng.randint(1, 4)
    counts = [rng.randint(1, 4) for _ in range(3)]
    runs = [(rng.randint(0, 48 - 4 * src_step), 16 * index, count) for index, count in enumerate(counts)]
    return CopyPlan(np.array(runs, np.uint32), tuple(patterns), src_step, dst_step)
