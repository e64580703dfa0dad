"""What every transport must do, as tests. A backend runs them all in a few lines::

    class TestMine(TransportConformance):
        def make(self, agent: str) -> Transport:
            return MyTransport(agent, {})

    class TestMineBetweenProcesses(ProcessConformance):
        owner_spec = ("mine", {})  # the owner's name in the registry and its options, in a process of its own

        def make(self, agent: str) -> Transport:
            return MyTransport(agent, {})

Needs pytest. Every wait has a deadline; nothing is asserted about speed.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import GridRef
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.testing.arena import PRIVATE
from pd_connector.testing.conformance_endings import Endings
from pd_connector.testing.owner_process import LocalOwner, Owner, ProcessOwner
from pd_connector.testing.pair import (
    CAPABILITY,
    DEADLINE_S,
    IMPOSSIBLE_PLANS,
    LEASE,
    PEER,
    SEED,
    Pair,
    random_plan,
    strided_plan,
)
from pd_connector.transport.base import Completion, LeaseId, Status, Transport

Planner = Callable[[random.Random, Sequence[GridRef]], CopyPlan]


class TransportConformance(Endings):
    """Reader and owner in one process. ``memory`` and ``target_memory`` say where the owner's and the reader's bytes
    lie (see Arena)."""

    memory: ClassVar[str] = PRIVATE
    target_memory: ClassVar[str] = PRIVATE

    def make(self, agent: str) -> Transport:
        """A fresh transport for an agent of this name."""
        raise NotImplementedError

    def make_owner(self, geometry: str) -> Owner:
        return LocalOwner(self.make("owner"), geometry, SEED, self.memory)

    @pytest.fixture
    def pairs(self) -> Iterator[Callable[[str], Pair]]:
        """Makes connected pairs of a geometry and closes them in the end."""
        closing: list[Any] = []

        def build(geometry: str) -> Pair:
            owner = self.make_owner(geometry)
            closing.append(owner)
            reader = self.make("reader")
            closing.append(reader)
            return Pair(reader, owner, geometry, self.target_memory)

        yield build
        for each in reversed(closing):
            each.close()

    @pytest.fixture
    def mixed(self, pairs: Callable[[str], Pair]) -> Pair:
        return pairs("mixed")

    @pytest.fixture
    def big(self, pairs: Callable[[str], Pair]) -> Pair:
        """64 blocks of 1 MiB, destination poisoned."""
        pair = pairs("big")
        pair.target.poison()
        return pair

    # Reach

    def test_description_is_small_and_reachable(self, mixed: Pair) -> None:
        assert len(mixed.owner.describe()) <= 1024
        assert mixed.reader.can_reach(mixed.owner.describe()) is None

    def test_a_strange_description_is_refused_in_words(self, mixed: Pair) -> None:
        for remote in (b"", b"\xc1", b"\x93\x01\xa1x", b"[]" * 400, b"\xff" * 1024):
            reason = mixed.reader.can_reach(remote)
            assert isinstance(reason, str), remote
            assert len(reason) > 10
            mixed.reader.connect("stranger", remote, tag := mixed.tag())
            assert mixed.wait(tag).status in (Status.ERROR, Status.PEER_LOST)

    def test_connecting_again_is_allowed(self, mixed: Pair) -> None:
        assert mixed.wait(mixed.connect()).status is Status.DONE
        mixed.settle()

    # Bytes

    @pytest.mark.parametrize("make_plan", [random_plan, strided_plan])
    def test_plans_are_byte_exact(self, mixed: Pair, make_plan: Planner) -> None:
        rng = random.Random(SEED)
        for _ in range(80):
            plan = make_plan(rng, mixed.target.grids)
            expected = mixed.target.expect(plan, mixed.source, mixed.target.arrays)
            completion = mixed.wait(mixed.read(plan))
            assert completion.status is Status.DONE, completion
            assert mixed.target.same(expected), f"wrong bytes for {plan}"

    def test_whole_blocks_of_each_group(self, mixed: Pair) -> None:
        rng = random.Random(SEED)
        for group in (0, 1):
            plan = mixed.blocks(rng.sample(range(48), 33), rng.sample(range(48), 33), group)
            expected = mixed.target.expect(plan, mixed.source, mixed.target.arrays)
            assert mixed.wait(mixed.read(plan)).status is Status.DONE
            assert mixed.target.same(expected)

    def test_blocks_larger_than_any_slice(self, pairs: Callable[[str], Pair]) -> None:
        pair = pairs("huge_blocks")
        plan = pair.blocks([2, 0], [0, 1])
        expected = pair.target.expect(plan, pair.source, pair.target.arrays)
        assert pair.wait(pair.read(plan)).status is Status.DONE
        assert pair.target.same(expected)

    def test_many_reads_at_once(self, mixed: Pair) -> None:
        rng = random.Random(SEED)
        order = rng.sample(range(48), 48)
        expected = mixed.target.snapshot()
        tags = []
        for index, (src, dst) in enumerate(zip(rng.sample(range(48), 48), order, strict=True)):
            plan = mixed.blocks([src], [dst], index % 2)
            expected = mixed.target.expect(plan, mixed.source, expected)
            tags.append(mixed.read(plan, priority=index % 3 % 2))
        mixed.wait(*tags)
        assert {mixed.ended[tag].status for tag in tags} == {Status.DONE}
        assert mixed.target.same(expected)

    def test_an_empty_plan_is_done(self, mixed: Pair) -> None:
        before = mixed.target.snapshot()
        for plan in (
            CopyPlan(np.zeros((0, 3), np.uint32), (Pattern(0, 0, 0, 0, 1),)),
            CopyPlan(coalesce([0], [0]), ()),
        ):
            assert mixed.wait(mixed.read(plan, lease=LeaseId(999, 9))).status is Status.DONE
        assert mixed.target.same(before)

    # The caller's mistakes

    def test_a_plan_beyond_any_memory_is_refused_at_once(self, mixed: Pair) -> None:
        before = mixed.target.snapshot()
        for plan in IMPOSSIBLE_PLANS:
            with pytest.raises(LocalProtocolError):
                mixed.read(plan)
        mixed.settle()
        assert mixed.target.same(mixed.target.expect(mixed.blocks([0]), mixed.source, before))

    def test_an_impossible_claim_is_refused_at_once(self, mixed: Pair) -> None:
        for lease in (LeaseId(-1, 1), LeaseId(2**70, 1), LeaseId(1, -1), LeaseId(1, 2**63)):
            with pytest.raises(LocalProtocolError):
                mixed.read(mixed.blocks([0]), lease=lease)
        with pytest.raises(LocalProtocolError):
            mixed.read(mixed.blocks([0]), capability=b"x" * 65)
        mixed.settle()

    def test_a_tag_in_use_is_refused_at_once(self, big: Pair) -> None:
        tag = big.read(big.blocks(range(32)))
        with pytest.raises(LocalProtocolError, match="tag"):
            big.reader.post_read(PEER, LEASE, CAPABILITY, big.blocks([63]), tag)
        assert big.wait(tag).status is Status.DONE

    # Permission

    def refused(self, pair: Pair, plan: CopyPlan, **asked: Any) -> Completion:
        before = pair.target.snapshot()
        completion = pair.wait(pair.read(plan, **asked))
        assert pair.target.same(before), "a refused read wrote"
        return completion

    def test_only_the_lease_epoch_and_capability_granted_open_a_block(self, mixed: Pair) -> None:
        plan = mixed.blocks([1, 2])
        for asked in (
            {"lease": LeaseId(8, 1)},
            {"lease": LeaseId(7, 2)},
            {"capability": b"conformance-0124"},
            {"capability": b""},
            {"capability": CAPABILITY + b"\0"},
        ):
            completion = self.refused(mixed, plan, **asked)
            assert completion.status is Status.NOT_GRANTED, asked
            assert completion.detail
        mixed.settle()

    def test_only_leased_blocks_are_readable(self, mixed: Pair) -> None:
        lease = LeaseId(8, 1)
        mixed.owner.grant(lease, CAPABILITY, {0: [3, 4, 9], 1: []})
        assert mixed.wait(mixed.read(mixed.blocks([3, 4, 9]), lease=lease)).status is Status.DONE
        for blocks, group in (([5], 0), ([3, 4, 5], 0), ([10], 0), ([2, 3], 0), ([47], 0), ([3], 1)):
            completion = self.refused(mixed, mixed.blocks(blocks, None, group), lease=lease)
            assert completion.status is Status.NOT_GRANTED, blocks

    def test_a_grant_that_grows_disturbs_no_read(self, mixed: Pair) -> None:
        """Blocks are added to a lease while others of it are read, many times."""
        lease, plan = LeaseId(8, 1), mixed.blocks(list(range(24)))
        for known in [*range(24, 48)] * 4:
            mixed.owner.grant(lease, CAPABILITY, {0: list(range(known))})
            tags = [mixed.read(plan, lease=lease) for _ in range(3)]
            for more in (known, known + 1):
                mixed.owner.grant(lease, CAPABILITY, {0: list(range(more))})
            mixed.wait(*tags)
            assert {mixed.ended[tag].status for tag in tags} == {Status.DONE}, known
        assert mixed.wait(mixed.read(mixed.blocks([47]), lease=lease)).status is Status.DONE
        mixed.owner.grant(lease, CAPABILITY, {0: list(range(47))})
        assert self.refused(mixed, mixed.blocks([47]), lease=lease).status is Status.NOT_GRANTED

    def test_a_wrong_capability_and_a_foreign_block_look_alike(self, mixed: Pair) -> None:
        lease = LeaseId(8, 1)
        mixed.owner.grant(lease, CAPABILITY, {0: [3]})
        foreign = self.refused(mixed, mixed.blocks([4]), lease=lease)
        forged = self.refused(mixed, mixed.blocks([3]), lease=lease, capability=b"x" * 16)
        assert (foreign.status, foreign.detail) == (forged.status, forged.detail)

    def test_revoke_ends_the_lease_and_only_that(self, mixed: Pair) -> None:
        mixed.owner.grant(LeaseId(8, 1), CAPABILITY, {0: [3]})
        mixed.owner.revoke(LEASE)
        assert self.refused(mixed, mixed.blocks([3])).status is Status.NOT_GRANTED
        assert mixed.wait(mixed.read(mixed.blocks([3]), lease=LeaseId(8, 1))).status is Status.DONE
        mixed.owner.revoke(LeaseId(404, 1))
        mixed.owner.grant(LEASE, CAPABILITY, mixed.all_blocks())
        mixed.settle()

    def test_revoke_in_the_middle_ends_the_read_once(self, big: Pair) -> None:
        tag = big.read(big.long(range(63)))
        big.catch()
        big.owner.revoke(LEASE)
        assert big.wait(tag).status in (Status.DONE, Status.NOT_GRANTED)

    def test_a_capability_of_odd_size_is_not_granted(self, mixed: Pair) -> None:
        for capability in (b"", b"short", b"x" * 65):
            with pytest.raises(LocalProtocolError):
                mixed.reader.grant(LeaseId(1, 1), capability, {0: np.zeros(1, np.uint32)})

    def test_a_source_that_does_not_exist_is_an_error(self, mixed: Pair) -> None:
        for pattern in (Pattern(7, 0, 0, 0, 1), Pattern(0, 0, 4095, 0, 2), Pattern(5, 0, 0, 0, 4096)):
            completion = self.refused(mixed, CopyPlan(coalesce([1], [1]), (pattern,)))
            assert completion.status is Status.ERROR, completion

    def test_a_source_block_that_does_not_exist_is_refused(self, mixed: Pair) -> None:
        for block in (48, 2**31, 2**32 - 1):
            completion = self.refused(mixed, CopyPlan(coalesce([block], [1]), (Pattern(0, 0, 0, 0, 8),)))
            assert completion.status in (Status.ERROR, Status.NOT_GRANTED)

    # Fairness

    def comes_first(self, pair: Pair, slow: Callable[[], list[int]], quick: Callable[[], int]) -> None:
        """``quick`` is posted after ``slow`` and ends before. On a busy machine the slow ones may be over before the
        quick one is posted, hence several tries; a transport without the property passes none of them."""
        for _ in range(8):
            behind, ahead = slow(), quick()
            pair.wait(*behind, ahead)
            assert {pair.ended[tag].status for tag in (*behind, ahead)} == {Status.DONE}
            order = list(pair.ended)
            if all(order.index(ahead) < order.index(tag) for tag in behind):
                return
        pytest.fail("it never came first")

    def test_a_small_read_passes_a_big_one(self, big: Pair) -> None:
        self.comes_first(big, lambda: [big.read(big.long(range(63)))], lambda: big.read(big.blocks([63])))

    def test_a_waiting_request_passes_background_reads(self, big: Pair) -> None:
        self.comes_first(
            big,
            lambda: [big.read(big.long(range(at, at + 20)), priority=1) for at in (0, 20)],
            lambda: big.read(big.blocks(range(40, 56))),
        )

    # Completions

    def test_the_descriptor_says_when_to_poll(self, mixed: Pair) -> None:
        tag = mixed.read(mixed.blocks(range(48)))
        end = time.monotonic() + DEADLINE_S
        found: list[Completion] = []
        while not found and time.monotonic() < end:
            ready, _, _ = select.select([mixed.reader.fileno()], [], [], DEADLINE_S)
            assert ready, "nothing became readable"
            found = mixed.reader.poll(8)
        assert [completion.tag for completion in found] == [tag]
        self.is_silent(mixed)

    def is_silent(self, pair: Pair) -> None:
        """A wake-up may be spurious, but not for ever."""
        for _ in range(50):
            if not select.select([pair.reader.fileno()], [], [], 0)[0]:
                return
            assert pair.reader.poll(8) == []
        pytest.fail("the descriptor stays readable although there is nothing to poll")

    def test_poll_keeps_its_limit(self, mixed: Pair) -> None:
        tags = [mixed.read(mixed.blocks([index])) for index in range(10)]
        assert mixed.reader.poll(0) == []
        seen: list[int] = []
        end = time.monotonic() + DEADLINE_S
        while len(seen) < len(tags) and time.monotonic() < end:
            select.select([mixed.reader.fileno()], [], [], 0.1)
            fresh = mixed.reader.poll(3)
            assert len(fresh) <= 3
            seen += [completion.tag for completion in fresh]
        assert sorted(seen) == tags

    def test_every_tag_ends_exactly_once_under_stress(self, mixed: Pair) -> None:
        rng = random.Random(SEED)
        tags: list[int] = []
        reads: list[int] = []
        for _ in range(400):
            dice = rng.random()
            if dice < 0.75:
                reads.append(mixed.read(random_plan(rng, mixed.target.grids), priority=rng.randint(0, 1)))
            elif dice < 0.93 and reads:
                mixed.reader.cancel(rng.choice(reads))
            elif dice < 0.96:
                tags.append(mixed.fence())
            else:
                mixed.pump()
        mixed.wait(*reads, *tags)
        assert {mixed.ended[tag].status for tag in tags} == {Status.DONE}
        assert {mixed.ended[tag].status for tag in reads} <= {Status.DONE, Status.CANCELLED}
        assert any(mixed.ended[tag].status is Status.DONE for tag in reads)
        mixed.settle()

    # Fork

    def test_a_fork_cannot_use_what_it_inherited(self, mixed: Pair) -> None:
        calls: list[Callable[[], object]] = [*self.calls(mixed.reader), lambda: mixed.reader.poll(1)]
        child = os.fork()
        if child == 0:
            wrong = 0
            for call in calls:
                try:
                    call()
                    wrong += 1
                except LocalProtocolError:
                    pass
                except BaseException:
                    wrong += 1
            mixed.reader.close()
            os._exit(wrong)
        end = time.monotonic() + DEADLINE_S
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hung")
        assert os.waitstatus_to_exitcode(status) == 0, "calls that did not raise LocalProtocolError"
        mixed.settle()

    def test_a_fork_that_lives_on_disturbs_nobody(self, mixed: Pair) -> None:
        """It holds every descriptor that was open: what is closed here must be gone all the same."""
        mixed.settle()
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            for _ in range(5):
                assert mixed.wait(mixed.fence()).status is Status.DONE
                assert mixed.wait(mixed.connect()).status is Status.DONE
                mixed.settle()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class ProcessConformance(TransportConformance):
    """The same with the owner in another process, and what can only happen to one."""

    owner_spec: ClassVar[tuple[str, Mapping[str, Any]]]

    def make_owner(self, geometry: str) -> Owner:
        name, options = self.owner_spec
        return ProcessOwner(name, options, geometry, SEED, self.memory)

    def signal(self, pair: Pair, number: signal.Signals) -> None:
        assert isinstance(pair.owner, ProcessOwner)
        pair.owner.signal(number)

    def test_the_owner_is_killed_in_the_middle(self, big: Pair) -> None:
        tag = big.read(big.long(range(63)))
        big.catch()
        self.signal(big, signal.SIGKILL)
        assert big.wait(tag).status in (Status.PEER_LOST, Status.DONE)
        assert big.wait(big.read(big.blocks([0]))).status is Status.PEER_LOST

    def test_a_stopped_owner_holds_nobody(self, big: Pair) -> None:
        """Who reads without the owner's help may also have read everything by then; who waited for it may have given it
        up."""
        self.signal(big, signal.SIGSTOP)
        first, second = big.read(big.blocks(range(32))), big.read(big.blocks(range(32, 63)))
        big.reader.cancel(first)
        fence = big.fence()
        assert big.wait(first, second, fence).status is Status.DONE
        assert {big.ended[tag].status for tag in (first, second)} <= {Status.CANCELLED, Status.DONE}
        big.target.poison()
        before = big.target.snapshot()
        self.signal(big, signal.SIGCONT)
        big.reader.disconnect(PEER)
        assert big.wait(big.connect()).status is Status.DONE
        big.settle()
        assert big.target.same(big.target.expect(big.blocks([0]), big.source, before))
