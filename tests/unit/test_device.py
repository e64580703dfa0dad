"""The device of the processor itself: what the devices of vendors must do as well."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError, TransportUnavailable
from pd_connector.memory import BlockGrid, MemoryKind, Region, native
from pd_connector.transport.device import Device, Direction, why_no_device

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device(MemoryKind.HOST)
    yield made
    made.close()


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.frombuffer(Region(address, size, (BlockGrid(0, 0, 0, size, size, 1),)).view(), np.uint8)


def test_there_and_back(device: Device) -> None:
    size = 300_001
    here = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    back = np.zeros_like(here)
    there = device.alloc(size)
    device.pin(here.ctypes.data, size)
    starts = np.arange(0, size, 1000, dtype=np.uint64)
    sizes = np.minimum(1000, size - starts).astype(np.uint64)
    order = np.random.default_rng(2).permutation(len(starts))
    device.move(np.stack((there + starts, here.ctypes.data + starts, sizes), 1)[order], Direction.TO_DEVICE)
    assert (bytes_at(there, size) == here).all()
    device.move(np.array([[back.ctypes.data, there, size]], np.uint64), Direction.TO_HOST)
    assert (back == here).all()
    device.move(np.array([[there, there + 1000, 1000]], np.uint64), Direction.ON_DEVICE)
    assert (bytes_at(there, 1000) == here[1000:2000]).all()
    device.unpin(here.ctypes.data)
    device.release(there)


def test_nothing_to_move(device: Device) -> None:
    device.move(np.zeros((0, 3), np.uint64), Direction.TO_HOST)


@pytest.mark.parametrize("moves", [np.zeros(3, np.uint64), np.zeros((1, 2), np.uint64), np.zeros((1, 3), np.int64)])
def test_odd_moves_are_refused(device: Device, moves: np.ndarray) -> None:
    with pytest.raises(LocalProtocolError, match="moves"):
        device.move(moves, Direction.TO_HOST)


def test_what_c_refuses_comes_in_its_words(device: Device) -> None:
    for call in (lambda: device.alloc(0), lambda: device.alloc(2**60), lambda: device.pin(0, 0)):
        with pytest.raises(LocalProtocolError, match="bytes"):
            call()
    with pytest.raises(TransportUnavailable, match="only 0"):
        Device(MemoryKind.HOST, 7)


def test_a_device_that_is_closed_is_refused(device: Device) -> None:
    device.close()
    device.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        device.alloc(1)


def test_a_kind_without_a_device_here_says_why() -> None:
    for kind in MemoryKind:
        reason = why_no_device(kind)
        if reason is None:
            Device(kind).close()
        else:
            with pytest.raises(TransportUnavailable):
                Device(kind)
