"""Between NVIDIA GPUs of one host by CUDA IPC: see csrc/cuda_ipc.c. Never run on a GPU by us."""

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
"""That ask and wait for the GPU at once: a slice, 4 MiB, takes no longer to copy than to ask for."""


class CudaOptions(Listening, frozen=True, forbid_unknown_fields=True):
    """``threads`` that read at once (0: four). ``transfer_ms`` until a GPU that does not copy counts as failed."""

    threads: Threads = 0
    transfer_ms: Annotated[int, Meta(ge=10, le=60000)] = 3000


class CudaTransport(NativeTransport):
    name: ClassVar[str] = "cuda"
    backend: ClassVar[str] = "cuda"
    takes = CudaOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.CUDA}), Scope.HOST)

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_listening(cls.name, options, CudaOptions)
        check_cpus(cls.name, parsed.cpus)
        packed = _SETTINGS.pack(parsed.transfer_ms)
        return cls._start(parsed.threads or _THREADS, parsed.cpus, False, addresses(cls.name, parsed), packed)
