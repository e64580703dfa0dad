"""GPUs as devices: memory, pinning, moves; and staged transports over them. Not run on hardware."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError, TransportUnavailable
from pd_connector.memory import MemoryKind
from pd_connector.testing.arena import PRIVATE
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.transport.base import Transport
from pd_connector.transport.device import Device, Direction
from pd_connector.transport.staged import StagedTcp

from .device import GPU, faults, library, things

SIZE = 4 << 20


class Board:
    """A device with memory of its own and pinned memory of the host, both known byte by byte."""

    def __init__(self, pinned: bool = True) -> None:
        self.device = Device(MemoryKind.CUDA, 0)
        self.near, self.far = (self.device.alloc(SIZE) for _ in range(2))
        self.bytes = {at: view(at) for at in (self.near, self.far)}
        self.whole = np.zeros(SIZE + 4096, np.uint8)
        skip = -self.whole.ctypes.data % 4096
        self.host = self.whole.ctypes.data + skip
        self.bytes[self.host] = self.whole[skip : skip + SIZE]
        if pinned:
            self.device.pin(self.host, SIZE)
        rng = np.random.default_rng(1)
        for array in self.bytes.values():
            array[:] = rng.integers(0, 256, SIZE, np.uint8)

    def try_(self, dst: int, src: int, sizes: list[int], direction: Direction) -> None:
        """Scattered pieces, in random order, each to a place of its own."""
        rng = random.Random(len(sizes))
        places, at = [], 0
        for size in sizes:
            at += rng.choice((0, 1, 4, 16, 48))
            places.append((at, rng.randrange(SIZE - size), size))
            at += size
        rng.shuffle(places)
        expected = self.bytes[dst].copy()
        for to, from_, size in places:
            expected[to : to + size] = self.bytes[src][from_ : from_ + size]
        moves = np.array([(dst + to, src + from_, size) for to, from_, size in places], np.uint64)
        self.device.move(moves, direction)
        assert np.array_equal(self.bytes[dst], expected)


def view(at: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    alias = library().emu_alias(at)
    return np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * SIZE).from_address(alias))


@pytest.fixture
def board() -> Iterator[Board]:
    before = things()
    made = Board()
    yield made
    faults("")
    made.device.unpin(made.host)
    for at in (made.near, made.far):
        made.device.release(at)
    made.device.close()
    assert things() == before


SIZES = {
    "one": [70000],
    "few, short": [100] * 4,
    "many, short": [random.Random(2).randrange(1, 600) for _ in range(3000)],
    "more than a lane takes": [100] * 9000,
    "many, long": [100_000] * 20,
    "mixed": [*[64] * 100, *[200_000] * 5],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_moves_in_every_direction(board: Board, sizes: list[int]) -> None:
    board.try_(board.host, board.near, sizes, Direction.TO_HOST)
    board.try_(board.near, board.host, sizes, Direction.TO_DEVICE)
    board.try_(board.far, board.near, sizes, Direction.ON_DEVICE)


def test_memory_begins_on_a_page(board: Board) -> None:
    assert board.near % 4096 == board.far % 4096 == 0


def test_short_moves_go_by_the_kernel_and_long_ones_by_batches(board: Board) -> None:
    faults("")
    board.try_(board.far, board.near, [64] * 1000, Direction.ON_DEVICE)
    assert (library().emu_calls(b"cuLaunchKernel"), library().emu_calls(b"cuMemcpyAsync")) == (1, 1)
    board.try_(board.host, board.near, [64] * 1000, Direction.TO_HOST)
    assert library().emu_calls(b"cuLaunchKernel") == 2
    board.try_(board.far, board.near, [100_000] * 20, Direction.ON_DEVICE)
    assert (library().emu_calls(b"cuLaunchKernel"), library().emu_calls(b"cuMemcpyBatchAsync")) == (2, 1)


def test_host_memory_that_is_not_pinned_is_kept_from_the_kernel() -> None:
    """It would cost the process its context; by a copy it is an error alone."""
    before, board = things(), Board(pinned=False)
    faults("")
    with pytest.raises(LocalProtocolError, match="CUDA error 1"):
        board.try_(board.host, board.near, [64] * 100, Direction.TO_HOST)
    assert library().emu_calls(b"cuLaunchKernel") == 0
    for at in (board.near, board.far):
        board.device.release(at)
    board.device.close()
    assert things() == before


@pytest.mark.parametrize(
    "name",
    ["cuMemcpyAsync", "cuMemcpyBatchAsync", "cuLaunchKernel", "cuStreamCreate", "cuStreamQuery", "stream"],
)
def test_a_move_that_fails_says_so_and_the_next_one_works(board: Board, name: str) -> None:
    sizes = [*[64] * 100, *[100_000] * 5]
    faults(f"{name}:1=719")
    with pytest.raises(LocalProtocolError, match="restart this process"):
        board.try_(board.far, board.near, sizes, Direction.ON_DEVICE)
    faults("")
    board.try_(board.far, board.near, sizes, Direction.ON_DEVICE)


@pytest.mark.parametrize("name", ["cuMemHostRegister_v2", "cuMemAlloc_v2", "cuModuleGetFunction"])
def test_without_what_the_kernel_needs_the_engine_copies(board: Board, name: str) -> None:
    faults(f"{name}:*=2")
    board.try_(board.far, board.near, [64] * 100, Direction.ON_DEVICE)


def test_what_cannot_be_had_is_refused_in_words(board: Board) -> None:
    with pytest.raises(TransportUnavailable, match="no such GPU"):
        Device(MemoryKind.CUDA, 7)
    faults("cuMemAlloc_v2:1=2")
    with pytest.raises(LocalProtocolError, match="gpu_memory_utilization"):
        board.device.alloc(4096)
    with pytest.raises(LocalProtocolError, match="registered already"):
        board.device.pin(board.host, 4096)


@pytest.mark.slow
class TestStagedTcp(TransportConformance):
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})


@pytest.mark.slow
class TestStagedTcpFromHostMemory(ProcessConformance):
    owner_spec = ("staged-tcp", {})
    memory, target_memory = PRIVATE, GPU

    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})
