"""A device of this process that copies between its memory and pinned host memory, in batches, by its own engine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError, TransportUnavailable
from pd_connector.memory import UNKNOWN, MemoryKind, Region, native
from pd_connector.transport.native import require

Moves = npt.NDArray[np.uint64]
"""Shape (n, 3), columns: destination, source, bytes. In no order; they do not overlap."""

log = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 5.0
_NAMES = {MemoryKind.HOST: "cpu", MemoryKind.NPU: "acl", MemoryKind.CUDA: "cuda"}
CURRENT = -1
"""The device that is the calling thread's current one."""


class Direction(IntEnum):
    TO_HOST = 0
    TO_DEVICE = 1
    ON_DEVICE = 2


def why_no_device(kind: MemoryKind) -> str | None:
    """Why memory of this kind has no device here, or None."""
    extension = native()
    if extension is None:
        return "the C extension is not installed"
    reason: str | None = extension.device_probe(_NAMES[kind])
    return reason


def index_of(region: Region) -> int:
    """The device that memory lies on, CURRENT if that cannot be told."""
    if region.device != UNKNOWN:
        return region.device
    index: int = require(_NAMES[region.kind]).device_index(_NAMES[region.kind], region.address)
    return index


def pci_of(region: Region) -> str:
    """The PCI address of the device that memory lies on, "" if that cannot be told."""
    if region.kind is MemoryKind.HOST:
        return ""
    try:
        address: str = require(_NAMES[region.kind]).device_pci(_NAMES[region.kind], index_of(region))
    except (TransportUnavailable, RuntimeError):
        return ""
    return address.lower()


class Device:
    """Raises TransportUnavailable when there is none. Thread-safe; what C refuses is a LocalProtocolError."""

    def __init__(self, kind: MemoryKind, index: int = CURRENT) -> None:
        self.kind = kind
        self._name = _NAMES[kind]
        reason = why_no_device(kind)
        if reason is not None:
            raise TransportUnavailable(self._name, reason)
        self._native = require(self._name)
        try:
            self._handle = self._native.device_open(self._name, index)
        except RuntimeError as error:
            raise TransportUnavailable(self._name, str(error)) from error
        self._idle = threading.Condition()  # guards the two below
        self._calls = 0
        self._closed = False

    def alloc(self, num_bytes: int) -> int:
        """The address of so many bytes of the device's memory."""
        with self._usable() as c:
            address: int = c.device_alloc(self._handle, num_bytes)
            return address

    def release(self, address: int) -> None:
        with self._usable() as c:
            c.device_release(self._handle, address)

    def pin(self, address: int, num_bytes: int) -> None:
        """Let the device's engine read and write host memory, until ``unpin``."""
        with self._usable() as c:
            c.device_pin(self._handle, address, num_bytes)

    def unpin(self, address: int) -> None:
        with self._usable() as c:
            c.device_unpin(self._handle, address)

    def move(self, moves: Moves, direction: Direction) -> None:
        """Returns when all of it is done and visible to whatever starts afterwards."""
        if moves.ndim != 2 or moves.shape[1] != 3 or moves.dtype != np.uint64:
            raise LocalProtocolError(f"moves must be uint64 of shape (n, 3), got {moves.dtype} of {moves.shape}")
        with self._usable() as c:
            c.device_move(self._handle, np.ascontiguousarray(moves), int(direction))

    def close(self) -> None:
        """Waits for the calls that other threads are in, within reason; idempotent."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            quiet = self._idle.wait_for(lambda: not self._calls, CLOSE_DEADLINE_S)
        if quiet:
            self._native.device_close(self._handle)
        else:
            log.error("device %s is in use %g s after its end: it stays open", self._name, CLOSE_DEADLINE_S)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[Any]:
        with self._idle:
            if self._closed:
                raise LocalProtocolError(f"device {self._name!r} is closed")
            self._calls += 1
        try:
            yield self._native
        except (RuntimeError, ValueError, OverflowError) as error:
            raise LocalProtocolError(f"device {self._name!r}: {error}") from error
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()
