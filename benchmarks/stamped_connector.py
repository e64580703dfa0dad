"""PDConnector and NixlConnector that note when forwards begin and end, for bench_pd.py: both processes' clocks are the
host's monotonic one. The file PDC_STAMPS gets two numbers (float64 seconds) per step that computed something."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector

from pd_connector.vllm_plugin import PDConnector


class _Stamps:
    _file: int | None = None
    _begun = 0.0

    def start(self) -> None:
        self._begun = time.monotonic()

    def end(self) -> None:
        if self._file is None:
            self._file = os.open(os.environ["PDC_STAMPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self._file, struct.pack("<dd", self._begun, time.monotonic()))


_stamps = _Stamps()


class _Stamped:
    """A step begins with the orders to the worker and ends before the connector's own work after the forward. Steps
    that compute nothing end at once, which is how the reader of the file tells them."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        _stamps.start()
        super().handle_preemptions(kv_connector_metadata)  # type: ignore[misc]

    def wait_for_save(self) -> None:
        _stamps.end()
        super().wait_for_save()  # type: ignore[misc]


class StampedConnector(_Stamped, PDConnector):  # type: ignore[misc]
    pass


class StampedNixl(_Stamped, NixlConnector):  # type: ignore[misc]
    pass
