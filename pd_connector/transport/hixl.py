"""Between Ascend NPUs by HIXL (HCCL family: HCCS or RoCE): see csrc/hixl.h. Never run on an NPU by us."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from pd_connector.memory import MemoryKind
from pd_connector.transport.base import Scope, Traits
from pd_connector.transport.native import NativeTransport, Threads, addresses, check_cpus
from pd_connector.transport.options import Listening, parse_listening

_SETTINGS = struct.Struct("=iII16s")
_THREADS = 8
"""That ask and wait for HIXL at once, four for one peer: a link of 100 GB/s moves a slice, 4 MiB, in the time of a
question."""


class HixlOptions(Listening, frozen=True, forbid_unknown_fields=True):
    """``threads`` that read at once, at most four from one peer (0: eight). ``device`` for an agent that has no memory
    on one (-1: device 0). ``transfer_ms`` and ``link_ms`` until a peer that does not answer counts as gone.
    ``buffer_pool`` is HIXL's option of that name ("0:0": straight from and into registered memory; "" leaves it
    alone)."""

    threads: Threads = 0
    device: Annotated[int, Meta(ge=-1, le=1024)] = -1
    transfer_ms: Annotated[int, Meta(ge=10, le=60000)] = 3000
    link_ms: Annotated[int, Meta(ge=10, le=60000)] = 1500
    buffer_pool: Annotated[str, Meta(pattern=r"^([0-9]{1,6}:[0-9]{1,6})?$")] = "0:0"


class HixlTransport(NativeTransport):
    name: ClassVar[str] = "hixl"
    backend: ClassVar[str] = "hixl"
    takes = HixlOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.NPU, MemoryKind.HOST}), Scope.NETWORK)
    for_devices: ClassVar[bool] = True

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_listening(cls.name, options, HixlOptions)
        check_cpus(cls.name, parsed.cpus)
        packed = _SETTINGS.pack(parsed.device, parsed.transfer_ms, parsed.link_ms, parsed.buffer_pool.encode())
        return cls._start(parsed.threads or _THREADS, parsed.cpus, False, addresses(cls.name, parsed), packed)
