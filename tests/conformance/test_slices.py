"""The parts every transport is built from: slices, host memory, grants, tags, doorbell."""

from __future__ import annotations

import random
import select
import threading

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.testing.arena import MIXED, Arena
from pd_connector.transport import doorbell as doorbell_module
from pd_connector.transport import tags as tags_module
from pd_connector.transport.base import Completion, LeaseId, Status
from pd_connector.transport.doorbell import Doorbell
from pd_connector.transport.grants import Grants
from pd_connector.transport.hostmem import HostMemory
from pd_connector.transport.slices import SLICE_BYTES, SLICE_CHUNKS, SLICE_PARTS, Slice, cut
from pd_connector.transport.tags import TagBook


def scattered(rng: random.Random, blocks: int, sizes: list[int]) -> CopyPlan:
    ids = rng.sample(range(blocks * 3), blocks), rng.sample(range(blocks * 3), blocks)
    patterns = [Pattern(index, index + 1, index * 3, index * 5, size) for index, size in enumerate(sizes)]
    return CopyPlan(coalesce(*ids), tuple(patterns))


@pytest.mark.parametrize("seed", range(40))
def test_slices_are_the_plan_and_stay_within_their_bounds(seed: int) -> None:
    rng = random.Random(seed)
    blocks = rng.choice([1, 2, 31, 700, 9_000])
    sizes = [rng.choice([1, 64, 4096, 65536, SLICE_BYTES // 2, SLICE_BYTES, SLICE_BYTES * 2 + 1])]
    sizes += [rng.choice([1, 64, 4096, 65536]) for _ in range(rng.choice([0, 3, 60, 3000 if blocks < 32 else 1]))]
    plan = scattered(rng, blocks, sizes)
    pairs = {(src + step, dst + step) for src, dst, count in plan.runs.tolist() for step in range(count)}
    total = 0
    covered: dict[int, int] = {}
    for piece in cut(plan):
        chunks = len(piece.src_blocks) * len(piece.src_parts)
        assert 0 < chunks <= SLICE_CHUNKS
        assert len(piece.src_parts) == len(piece.dst_parts) <= SLICE_PARTS
        assert piece.num_bytes == len(piece.src_blocks) * sum(part[2] for part in piece.src_parts) <= SLICE_BYTES
        assert set(zip(piece.src_blocks.tolist(), piece.dst_blocks.tolist(), strict=True)) <= pairs
        for (src, src_at, size), (dst, dst_at, dst_size) in zip(piece.src_parts, piece.dst_parts, strict=True):
            pattern = plan.patterns[src]
            assert (dst, dst_size) == (pattern.dst_grid, size)
            assert src_at - pattern.src_offset == dst_at - pattern.dst_offset
            assert 0 <= src_at - pattern.src_offset <= pattern.run_bytes - size
            covered[src] = covered.get(src, 0) + size * len(piece.src_blocks)
        total += piece.num_bytes
    assert total == plan.num_bytes
    assert covered == {index: plan.num_blocks * size for index, size in enumerate(sizes)}


def test_a_plan_is_cut_lazily() -> None:
    """The first slice of a terabyte comes without a list of the rest."""
    plan = CopyPlan(np.array([[0, 0, 1 << 20]], np.uint32), (Pattern(0, 0, 0, 0, 1 << 20),))
    assert next(cut(plan)).num_bytes == SLICE_BYTES


def test_host_memory_refuses_addresses_it_does_not_have() -> None:
    arena = Arena(MIXED, 1)
    memory = HostMemory(arena.regions)
    assert memory.fault(47, [(0, 0, 4096)]) is None
    for last, part in (
        (48, (0, 0, 1)),
        (0, (7, 0, 1)),
        (0, (-1, 0, 1)),
        (0, (0, 4096, 1)),
        (0, (0, -1, 1)),
        (0, (0, 0, 0)),
        (0, (0, 2**80, 1)),
    ):
        assert memory.fault(last, [part]), part
    assert HostMemory(()).fault(0, [(0, 0, 1)])


@pytest.mark.parametrize("part", [(0, 0, 4096), (4, 0, 65536)])
def test_a_stream_of_another_length_is_refused(part: tuple[int, int, int]) -> None:
    memory, blocks = HostMemory(Arena(MIXED, 1).regions), np.array([3, 4], np.uint32)
    piece = Slice(blocks, blocks, (part,), (part,), 2 * part[2])
    exact = np.zeros(piece.num_bytes, np.uint8)
    memory.place(piece, [exact, exact[:0]])
    with pytest.raises(RemoteProtocolError, match="1 bytes short"):
        memory.place(piece, [exact[:-1]])
    with pytest.raises(RemoteProtocolError, match="short"):
        memory.place(piece, [])
    with pytest.raises(RemoteProtocolError, match="too many"):
        memory.place(piece, [exact, exact[:1]])


def test_large_blocks_are_sent_from_where_they_lie() -> None:
    arena = Arena(MIXED, 1)
    pieces = HostMemory(arena.regions).load(np.array([7, 8, 3], np.uint32), [(4, 0, 65536)])
    assert [len(piece) for piece in pieces] == [131072, 65536]
    assert all(np.shares_memory(piece, arena.arrays[2]) for piece in pieces)


def test_grants_against_a_set() -> None:
    rng, grants, lease, key = random.Random(3), Grants(), LeaseId(1, 1), b"k" * 16
    for _ in range(300):
        leased = [rng.randrange(40) for _ in range(rng.randint(0, 30))]
        grants.add(lease, key, {0: np.array(leased, np.uint32), 1: np.arange(40, dtype=np.uint32)})
        asked = [rng.randrange(42) for _ in range(rng.randint(1, 5))]
        refusal = grants.refusal(lease, key, {0}, np.array(asked, np.uint32))
        assert (refusal is None) == (set(asked) <= set(leased))
        both = grants.refusal(lease, key, {0, 1}, np.array(asked, np.uint32))
        assert (both is None) == (set(asked) <= set(leased) and max(asked) < 40)
    grants.remove(lease)
    assert "not granted" in str(grants.refusal(lease, key, {0}, np.zeros(1, np.uint32)))


def test_tags_end_once_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags_module, "MAX_OPEN_TAGS", 3)
    book = TagBook()
    for tag in (1, 2, 3):
        book.open(tag)
    with pytest.raises(LocalProtocolError, match="3 reads are open"):
        book.open(4)
    assert book.finish(1, Status.DONE)
    assert not book.finish(1, Status.ERROR)
    assert not book.finish(99, Status.DONE)
    with pytest.raises(LocalProtocolError, match="in use"):
        book.open(1)  # its completion was not taken yet
    book.finish_all(Status.ERROR, "all")
    assert book.take(1) == [Completion(1, Status.DONE)]
    assert {completion.tag for completion in book.take(9)} == {2, 3}
    assert book.take(9) == []
    book.open(1)
    book.withdraw(1)
    book.open(1)
    book.close()
    assert not book.finish(1, Status.DONE)
    book.close()


@pytest.mark.parametrize("eventfd", [True, False])
def test_a_doorbell_rings_until_cleared(monkeypatch: pytest.MonkeyPatch, eventfd: bool) -> None:
    if not eventfd:
        monkeypatch.delattr(doorbell_module.os, "eventfd")
    bell = Doorbell()
    assert (bell._pair is None) == eventfd
    for _ in range(2):
        assert not select.select([bell.fileno()], [], [], 0)[0]
        threads = [threading.Thread(target=lambda: [bell.ring() for _ in range(2000)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert select.select([bell.fileno()], [], [], 10)[0]
        bell.clear()
    assert not select.select([bell.fileno()], [], [], 0)[0]
    bell.close()
    bell.ring()
    bell.close()
