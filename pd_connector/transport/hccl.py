"""Between Ascend NPUs by two-sided HCCL, for hosts without HIXL: see csrc/hccl.c. Never run on an NPU by us."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from pd_connector.memory import MemoryKind
from pd_connector.transport.base import Scope, Traits
from pd_connector.transport.native import NativeTransport, Threads, addresses, check_cpus
from pd_connector.transport.options import Listening, parse_listening

_SETTINGS = struct.Struct("=I")
_THREADS = 4
"""One of which reads from a peer at a time, for both sides of a communicator must issue the same in the same order."""


class HcclOptions(Listening, frozen=True, forbid_unknown_fields=True):
    """``threads`` that read at once, each from a peer of its own (0: four). ``transfer_ms`` until a peer that does not
    answer counts as gone."""

    threads: Threads = 0
    transfer_ms: Annotated[int, Meta(ge=10, le=60000)] = 3000


class HcclTransport(NativeTransport):
    name: ClassVar[str] = "hccl"
    backend: ClassVar[str] = "hccl"
    takes = HcclOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.NPU}), Scope.NETWORK)
    attempt_s: ClassVar[float] = 4.0  # a communicator takes 0.2 to 3.4 s to make
    instead_of: ClassVar[str] = "hixl"

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_listening(cls.name, options, HcclOptions)
        check_cpus(cls.name, parsed.cpus)
        packed = _SETTINGS.pack(parsed.transfer_ms)
        return cls._start(parsed.threads or _THREADS, parsed.cpus, False, addresses(cls.name, parsed), packed)
