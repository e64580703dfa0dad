"""Bytes of registered memory as the processor sees them: in place, or copied out of a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pd_connector.memory import MemoryKind, Pool, Region, shared_pool
from pd_connector.transport.device import Device, Direction, index_of

Bytes = npt.NDArray[np.uint8]


class Windows:
    """One thread at a time. What ``look`` gave is valid until the next call."""

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self._regions = tuple(regions)
        self._devices: dict[tuple[MemoryKind, int], Device] = {}
        self._copies: dict[tuple[MemoryKind, int], Pool] = {}

    def look(self, region: int, offset: int, num_bytes: int) -> Bytes:
        """Raises TransportUnavailable, LocalProtocolError when a device does not give its bytes out."""
        memory = self._regions[region]
        if memory.kind is MemoryKind.HOST:
            return np.frombuffer(memory.view(), np.uint8)[offset : offset + num_bytes]
        key = memory.kind, index_of(memory)
        device, copy = self._device(key, num_bytes)
        move = np.array([[copy.address, memory.address + offset, num_bytes]], np.uint64)
        device.move(move, Direction.TO_HOST)
        return np.frombuffer(copy, np.uint8)[:num_bytes]

    def _device(self, key: tuple[MemoryKind, int], num_bytes: int) -> tuple[Device, Pool]:
        if key not in self._devices:
            self._devices[key] = Device(*key)
        device, copy = self._devices[key], self._copies.get(key)
        if copy is None or len(copy) < num_bytes:
            if copy is not None:
                device.unpin(copy.address)
            copy = self._copies[key] = shared_pool(num_bytes)
            device.pin(copy.address, len(copy))
        return device, copy

    def close(self) -> None:
        for key, device in self._devices.items():
            if key in self._copies:
                device.unpin(self._copies[key].address)
            device.close()
        self._regions, self._devices, self._copies = (), {}, {}
