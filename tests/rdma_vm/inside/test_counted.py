"""What is asked of a device is what the plan says: requests, completions, packets as it counts."""

from __future__ import annotations

import random

from pd_connector.plan import CopyPlan, Pattern, coalesce, whole_patterns
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport.base import Status
from pd_connector.transport.native import TcpTransport
from pd_connector.transport.verbs import VerbsTransport

from .rxe import hardware, pair

MTU = 4096
BATCH = 64


def packets(bytes_of_a_run: int) -> int:
    """Both ends are this device: a request for each read, and as many answers as its bytes take."""
    return 1 + -(-bytes_of_a_run // MTU)


def read(over: Pair, plan: CopyPlan) -> tuple[dict[str, int], dict[str, int]]:
    """What the transport and the device counted during a read, byte for byte as planned."""
    assert isinstance(over.reader, VerbsTransport)
    expected = over.target.expect(plan, over.source, over.target.snapshot())
    ours, theirs = over.reader.counters(), hardware()
    assert over.wait(over.read(plan)).status is Status.DONE
    assert over.target.same(expected)
    after, there = over.reader.counters(), hardware()
    assert all(there[name] == theirs[name] for name in there if name.endswith("_err") or "exceeded" in name), there
    return {name: after[name] - ours[name] for name in after}, {name: there[name] - theirs[name] for name in there}


def test_scattered_runs_of_32_kib() -> None:
    """No two blocks are neighbours on both sides: as many requests as blocks."""
    with pair("big") as over:
        rng = random.Random(SEED)
        src, dst = rng.sample(range(0, 64, 2), 16), rng.sample(range(1, 64, 2), 16)
        size = 32768
        plan = CopyPlan(coalesce(src, dst), (Pattern(0, 0, 0, 0, size),))
        ours, theirs = read(over, plan)
        assert ours["requests"] == 16
        assert ours["bytes"] == 16 * size
        assert ours["batches"] <= 2  # slices; one completion for each batch
        assert theirs["sent_pkts"] - theirs["duplicate_request"] == 16 * packets(size)
        assert theirs["rcvd_pkts"] == theirs["sent_pkts"]


def test_neighbours_are_one_request() -> None:
    with pair("big") as over:
        ours, _ = read(over, over.blocks(range(8), range(20, 28)))  # eight times 1 MiB, which is the longest
        assert (ours["requests"], ours["batches"], ours["bytes"]) == (8, 8, 8 << 20)
    with pair("mixed") as over:
        ours, theirs = read(over, CopyPlan(coalesce(range(40), range(8, 48)), whole_patterns(over.target.grids[:1], 0)))
        assert (ours["requests"], ours["batches"], ours["bytes"]) == (1, 1, 40 * 4096)
        assert theirs["sent_pkts"] == packets(40 * 4096)


def test_a_batch_is_full_before_the_next_one() -> None:
    with pair("mixed") as over:
        src, dst = list(range(0, 48, 2)), list(range(1, 48, 2))
        plan = CopyPlan(coalesce(src, dst), whole_patterns(over.target.grids, 0))
        ours, _ = read(over, plan)
        runs = sum(len(src) for _ in plan.patterns)
        slices = -(-plan.num_bytes // (1 << 20))
        assert ours["requests"] == runs
        assert ours["batches"] <= -(-runs // BATCH) + slices


def test_the_owner_is_asked_once_per_lane() -> None:
    with pair("big", queue_pairs=2) as over:
        for _ in range(3):
            ours, _ = read(over, over.blocks(range(16)))
            assert 1 <= ours["asks"] <= 2, "16 MiB are less than one answer is good for"


def test_nothing_goes_by_rdma_that_was_not_asked_for() -> None:
    with pair("mixed") as over:
        before = hardware()
        refused = over.read(over.blocks([1]), capability=b"x" * 16)
        assert over.wait(refused).status is Status.NOT_GRANTED
        assert hardware()["sent_pkts"] == before["sent_pkts"]


def test_the_counters_can_fail() -> None:
    """A control: a read over tcp moves the same bytes, and the device counts none of them."""
    served = LocalOwner(TcpTransport("owner", {}), "mixed", SEED)
    reader = TcpTransport("reader", {})
    over = Pair(reader, served, "mixed")
    before = hardware()["sent_pkts"]
    assert over.wait(over.read(over.blocks(range(48)))).status is Status.DONE
    assert hardware()["sent_pkts"] == before
    reader.close()
    served.close()
