"""The part of the conformance suite about how reads end: once, and with a destination that is quiet."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pd_connector.errors import LocalProtocolError
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.testing.arena import GEOMETRIES, Arena
from pd_connector.testing.pair import CAPABILITY, LEASE, PEER, SEED, Pair
from pd_connector.transport.base import Status, Transport


class Endings:
    def ends_quietly(self, pair: Pair, end: Callable[[int], None]) -> None:
        """``end`` in the middle of a read of most of the memory: CANCELLED, and not a byte written after that."""
        for _ in range(10):
            pair.target.poison()
            tag = pair.read(pair.long(range(1, 64), range(63)))
            pair.catch()
            end(tag)
            if pair.wait(tag).status is Status.CANCELLED:
                break
        else:
            pytest.fail("every read ended before it could be cancelled")
        pair.target.poison()
        pair.settle()
        expected = Arena(GEOMETRIES["big"], SEED)
        expected.poison()
        assert pair.target.same(pair.target.expect(pair.blocks([0]), pair.source, expected.arrays))

    def test_cancel_in_the_middle(self, big: Pair) -> None:
        self.ends_quietly(big, big.reader.cancel)

    def test_fence_in_the_middle(self, big: Pair) -> None:
        fences: list[int] = []

        def fence(tag: int) -> None:
            fences.append(big.fence())
            assert big.wait(fences[-1]).status is Status.DONE
            assert tag in big.ended, "the fence was done before the read ended"

        self.ends_quietly(big, fence)

    def test_fence_after_disconnect_in_the_middle(self, big: Pair) -> None:
        """What a protocol does that gave a peer up: the fence must still wait for what may write."""

        def fence(tag: int) -> None:
            big.reader.disconnect(PEER)
            assert big.wait(big.fence()).status is Status.DONE
            assert tag in big.ended, "the fence was done before the read ended"
            assert big.wait(big.connect()).status is Status.DONE

        self.ends_quietly(big, fence)

    def test_fence_after_connecting_again_in_the_middle(self, big: Pair) -> None:
        def fence(tag: int) -> None:
            again = big.connect()
            assert big.wait(big.fence()).status is Status.DONE
            assert tag in big.ended, "the fence was done before the read ended"
            big.wait(again)
            assert big.wait(big.connect()).status is Status.DONE

        self.ends_quietly(big, fence)

    def test_disconnect_in_the_middle(self, big: Pair) -> None:
        def disconnect(tag: int) -> None:
            big.reader.disconnect(PEER)
            big.wait(tag)
            assert big.wait(big.connect()).status is Status.DONE

        self.ends_quietly(big, disconnect)

    def test_cancel_at_once_and_after(self, big: Pair) -> None:
        first, second = big.read(big.blocks([1])), big.read(big.blocks([2]))
        big.reader.cancel(first)
        assert big.wait(first).status in (Status.CANCELLED, Status.DONE)
        assert big.wait(second).status is Status.DONE
        for tag in (first, second, 10**9):
            big.reader.cancel(tag)
        big.settle()

    def test_cancel_ends_only_its_read(self, big: Pair) -> None:
        victim, other = big.read(big.blocks(range(40))), big.read(big.blocks(range(40, 63)))
        big.reader.cancel(victim)
        assert big.wait(victim, other).status is Status.DONE

    def test_fence_with_nothing_to_end(self, mixed: Pair) -> None:
        assert mixed.wait(mixed.fence()).status is Status.DONE
        mixed.settle()
        mixed.reader.fence("nobody", tag := mixed.tag())
        assert mixed.wait(tag).status is Status.DONE

    def test_a_peer_that_is_not_connected_is_lost(self, mixed: Pair) -> None:
        mixed.reader.disconnect(PEER)
        assert mixed.wait(mixed.read(mixed.blocks([0]))).status is Status.PEER_LOST
        assert mixed.wait(mixed.connect()).status is Status.DONE
        mixed.settle()
        mixed.reader.disconnect("nobody")

    def test_close_with_reads_posted(self, big: Pair) -> None:
        big.read(big.long(range(63)))
        big.catch()
        big.reader.close()
        big.target.poison()
        before = big.target.snapshot()
        big.reader.close()
        assert big.reader.poll(8) == []
        assert big.target.same(before)
        for refused in self.calls(big.reader):
            with pytest.raises(LocalProtocolError):
                refused()

    def test_the_owner_closes_in_the_middle(self, big: Pair) -> None:
        tag = big.read(big.long(range(63)))
        big.catch()
        big.owner.close()
        assert big.wait(tag).status in (Status.PEER_LOST, Status.DONE)
        assert big.wait(big.read(big.blocks([0]))).status is Status.PEER_LOST

    def test_close_with_completions_that_nobody_took(self, mixed: Pair) -> None:
        mixed.reader.disconnect(PEER)
        mixed.read(mixed.blocks([0]))
        mixed.read(CopyPlan(coalesce([0], [0]), ()))
        mixed.reader.close()

    def test_nobody_at_the_address(self, mixed: Pair) -> None:
        """Such a connect ends by itself or when the caller's patience does, but it ends, once."""
        mixed.owner.close()
        tag = mixed.connect()
        end = time.monotonic() + 2.0
        while tag not in mixed.ended and time.monotonic() < end:
            mixed.pump(0.1)
        mixed.reader.disconnect(PEER)
        assert mixed.wait(tag).status in (Status.PEER_LOST, Status.CANCELLED, Status.ERROR)

    def calls(self, transport: Transport) -> list[Callable[[], object]]:
        """Every method that a dead or inherited handle must refuse."""
        plan = CopyPlan(coalesce([0], [0]), (Pattern(0, 0, 0, 0, 8),))
        return [
            lambda: transport.connect(PEER, b"", 10**6),
            lambda: transport.disconnect(PEER),
            lambda: transport.post_read(PEER, LEASE, CAPABILITY, plan, 10**6 + 1),
            lambda: transport.cancel(1),
            lambda: transport.fence(PEER, 10**6 + 2),
            lambda: transport.grant(LEASE, CAPABILITY, {}),
            lambda: transport.revoke(LEASE),
            lambda: transport.register([]),
            lambda: transport.unregister(),
        ]
