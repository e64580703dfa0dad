"""Memory of one kind whose every word is known: what the self-test reads from and into."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pd_connector.memory import UNKNOWN, BlockGrid, MemoryKind, Pool, Region
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.transport.device import Device, Direction

SIZES = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20)
"""Bytes of a block: group ``i`` cuts the same memory into blocks of ``SIZES[i]``."""
NUM_BYTES = 32 << 20
_POISON = 0xA5
_GRIDS = tuple(BlockGrid(group, 0, 0, size, size, NUM_BYTES // size) for group, size in enumerate(SIZES))

Bytes = npt.NDArray[np.uint8]


def truth(seed: int) -> Bytes:
    """What an owner has: every word differs, also from those of another seed."""
    words = np.arange(NUM_BYTES // 8, dtype=np.uint64) + np.uint64(seed << 24)
    return (words * np.uint64(0x9E3779B97F4A7C15)).view(np.uint8)


class Testbed:
    """``host`` is the memory itself where it is the host's, else its image, moved by the device on ``put`` and ``get``.
    Raises TransportUnavailable where there is no such device, LocalProtocolError where it has no memory."""

    def __init__(self, kind: MemoryKind, device: int) -> None:
        pool = Pool(NUM_BYTES)
        self.host: Bytes = np.frombuffer(pool, np.uint8)
        self._device: Device | None = None
        address = pool.address
        if kind is not MemoryKind.HOST:
            self._device = Device(kind, device)
            self._device.pin(pool.address, NUM_BYTES)
            address = self._device.alloc(NUM_BYTES)
        number = UNKNOWN if kind is MemoryKind.HOST else device
        self.region = Region(address, NUM_BYTES, _GRIDS, kind, keepalive=self.host, device=number)
        self._image = pool.address

    def put(self) -> None:
        self._move(self.region.address, self._image, Direction.TO_DEVICE)

    def get(self) -> None:
        self._move(self._image, self.region.address, Direction.TO_HOST)

    def _move(self, dst: int, src: int, direction: Direction) -> None:
        if self._device is not None:
            self._device.move(np.array([[dst, src, NUM_BYTES]], np.uint64), direction)

    def fill(self, seed: int) -> None:
        self.host[:] = truth(seed)
        self.put()

    def spoil(self) -> None:
        """One wrong bit in every block of the largest size; a second time: right again."""
        self.get()
        self.host[SIZES[-1] // 2 + 5 :: SIZES[-1]] ^= 1
        self.put()

    def poison(self) -> None:
        self.host[:] = _POISON
        self.put()

    def touched(self) -> bool:
        """Whether anything has come since the poison."""
        self.get()
        return bool((self.host[:: SIZES[0] // 4] != _POISON).any())

    def check(self, expected: Bytes, plan: CopyPlan) -> str:
        """What is wrong after one read into poison; empty when every byte is right and no other was written."""
        self.get()
        size = plan.patterns[0].run_bytes
        want = np.full((NUM_BYTES // size, size), _POISON, np.uint8)
        want[plan.blocks(1)] = expected.reshape(-1, size)[plan.blocks(0)]
        got = self.host.reshape(want.shape)
        if np.array_equal(got, want):
            return ""
        wrong = got != want
        block = int(wrong.any(axis=1).argmax())
        at = int(wrong[block].argmax())
        words = f"{np.count_nonzero(wrong)} wrong bytes, the first is byte {at} of block {block} of {size} bytes"
        return f"{words}: {got[block, at]:#04x} instead of {want[block, at]:#04x}"


def scattered(group: int, random: np.random.Generator, times: int = 1) -> CopyPlan:
    """Half of the blocks of a size, from anywhere to anywhere; ``times`` over makes it last."""
    count, size = _GRIDS[group].num_blocks, SIZES[group]
    src, dst = (random.permutation(count)[: count // 2] for _ in range(2))
    return CopyPlan(coalesce(src, dst), (Pattern(group, group, 0, 0, size),) * times)
