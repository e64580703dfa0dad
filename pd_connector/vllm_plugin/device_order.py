"""Order between an engine's device and what peers are told: a forward is only launched when the connector is called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pd_connector.memory import MemoryKind, Region
from pd_connector.transport.worker import Worker

logger = logging.getLogger(__name__)


class DeviceOrder:
    """Does what it is given, in turn, once the device has done what was launched before: bytes that a kernel has still
    to write are not offered, and blocks that one may still touch are not read into. With host memory, at once."""

    def __init__(self, regions: Sequence[Region]) -> None:
        kinds = {region.kind for region in regions} - {MemoryKind.HOST}
        # torch.cuda or torch.npu: what the regions' tensors made torch load.
        self._events: Any = getattr(torch, next(iter(kinds)).value) if kinds else None
        self._waiter = Worker("pdc-device-order") if kinds else None

    def after(self, do: Callable[[], None], *, anyway: bool = False) -> None:
        """On the thread whose current stream the engine launches to. ``anyway``: also when the device failed."""
        if self._waiter is None:
            do()
            return
        event = self._events.Event(blocking=True)
        event.record()
        self._waiter.submit(lambda: self._when(event, do, anyway))

    @staticmethod
    def _when(event: Any, do: Callable[[], None], anyway: bool) -> None:
        try:
            event.synchronize()
        except Exception:  # the device's own error ends the engine, too
            logger.exception("the device failed in what it was to finish first")
            if not anyway:
                return  # it is not offered
        try:
            do()
        except Exception:  # an agent that closes meanwhile: nobody else would be told
            logger.exception("what the device had finished was not passed on")

    def close(self) -> None:
        """What still waits is given up."""
        if self._waiter is not None:
            self._waiter.close(wait=False)
