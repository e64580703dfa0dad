"""A case of the transfer benchmark: what is moved, where and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from pd_connector.bench.work import GRIDS
from pd_connector.errors import ConfigError, TransportUnavailable


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``num_bytes`` is rounded down to whole blocks of all grids, at least one. Memory that is ``owned`` is a shared
    pool, which a reader of the same host maps, ``foreign`` is any other; ``huge``: all memory in huge pages, as agents
    make it. ``pin`` keeps each thread of a native transport on one processor, so that both ends of a lane
    share it. ``veth`` are two network namespaces of this host; it needs root. ``host`` is the address of the end that
    runs this, ``more`` are further options of the transport."""

    transport: str = "shm"
    scope: Literal["host", "veth"] = "host"
    memory: Literal["owned", "foreign"] = "owned"
    huge: bool = False
    threads: int = 2
    pin: bool = False
    chunk_bytes: int = 65536
    num_bytes: int = 224 << 20
    rounds: int = 7
    host: str = "127.0.0.1"
    more: dict[str, Any] = {}

    @property
    def blocks(self) -> int:
        """Per grid."""
        return max(1, self.num_bytes // self.chunk_bytes // GRIDS)

    @property
    def chunks(self) -> int:
        return self.blocks * GRIDS

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot be."""
        for name in ("threads", "chunk_bytes", "num_bytes", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} of a benchmark: at least 1")
        if self.chunk_bytes % 8:
            raise ConfigError(f"chunk_bytes {self.chunk_bytes}: give a multiple of 8")
        # Owner and reader have twice what is read, so has what is expected, and the limit's process twice that.
        need, free = 10 * self.chunks * self.chunk_bytes >> 20, _available_mib()
        if need > free:
            what = f"{self.chunks} chunks of {self.chunk_bytes} bytes"
            raise ConfigError(f"{what} take {need} MiB of memory, {free} are free: give a smaller --chunk or --mib")


def _available_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) >> 10


def options(case: Case, address: str) -> dict[str, Any]:
    """What a transport of the case is started with; ``address`` is this end's between namespaces.

    Raises TransportUnavailable for one that does not leave a process."""
    if case.transport == "inproc":
        raise TransportUnavailable("inproc", "it does not leave a process, and this takes two")
    threaded = case.transport not in ("zmq", "verbs")
    found: dict[str, Any] = {"threads": case.threads, "pin": case.pin} if threaded else {}
    if case.transport != "shm":
        found["host"] = address if case.scope == "veth" else case.host
    return found | case.more
