"""Every transport whose data plane is the C extension; a backend in C is a class of a few lines here.

C does what must be fast or must not wait for the interpreter: it cuts plans into slices, moves them in its own threads
and ends reads. It crosses over once per call, in packed arrays whose size is the number of runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, count
from types import ModuleType
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from pd_connector.config import Cpu
from pd_connector.errors import ConfigError, LocalProtocolError, TransportUnavailable
from pd_connector.memory import MemoryKind, Pool, Region, native, order_grids, pool_at
from pd_connector.plan import MAX_DIMS, CopyPlan, Dim, Pattern
from pd_connector.transport.base import Completion, LeasedBlocks, LeaseId, PeerId, Scope, Status, Traits, Transport
from pd_connector.transport.grants import check_capability, check_claim
from pd_connector.transport.options import Listening, parse_listening, parse_options

logger = logging.getLogger(__name__)

_abandoned: list[object] = []
"""Memory that a device was given up with: leaked rather than corrupted."""
_STATUS = (Status.DONE, Status.CANCELLED, Status.NOT_GRANTED, Status.PEER_LOST, Status.ERROR)
_REGION = struct.Struct("=QQiIQQiI")
_READ_ONLY, _DMA_BUF, _OF_DEVICE = 1, 2, 4
_GRID = struct.Struct("=IIQQQQ")
_PATTERN = struct.Struct("=14Q")
_ONCE = Dim(1, 0, 0)
_MAX_PACKED = 256
Threads = Annotated[int, Meta(ge=0, le=64)]
FEWEST_LANES, LANES_NEAR = 2, 0.85
"""One lane leaves half of what two move behind wherever there are two processors."""
_NEVER = 0
"""A peer number that C never saw."""


class NativeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``threads`` that copy for this agent's reads (0: two, or one where they have one processor), ``cpus`` they run on
    (default: all this process may use); with ``pin`` each of them on one, in turn."""

    threads: Threads = 0
    cpus: tuple[Cpu, ...] = ()
    pin: bool = False


class TcpOptions(Listening, frozen=True, forbid_unknown_fields=True):
    """``threads`` of this agent, and so connections to every peer (0: as many as a short try at the start finds to be
    worth having, at most eight); ``pin`` as in NativeOptions."""

    threads: Threads = 0
    pin: bool = False


class NativeTransport(Transport):
    backend: ClassVar[str]
    takes: ClassVar[type[NativeOptions | Listening]]

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        self._agent, self._pid = agent, os.getpid()
        self._native = require(self.name)
        self._lock = threading.Lock()  # C must not be called while or after it closes
        self._closed = False
        self._peers: dict[PeerId, int] = {}
        self._numbers = count(_NEVER + 1)
        self._packed: OrderedDict[int, tuple[tuple[Pattern, ...], bytes]] = OrderedDict()
        self._registered: list[object] = []  # reads may still write into memory that was unregistered
        try:
            self._handle = self._open(options)
            # Also for an agent that nobody closed: C's threads must not outlive the memory that they write to.
            self._finish = weakref.finalize(self, _close, self._native, self._handle, self._registered, self._pid)
            self._description: bytes = self._native.describe(self._handle)
        except RuntimeError as error:
            raise TransportUnavailable(self.name, str(error)) from error
        self._fileno: int = self._native.fileno(self._handle)

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        """A handle of the extension. Raises ConfigError, TransportUnavailable, RuntimeError with C's words."""
        raise NotImplementedError

    @classmethod
    def _start(
        cls, threads: int, cpus: tuple[int, ...], pin: bool, listen: tuple[str, str, int], settings: bytes = b""
    ) -> Any:
        return require(cls.name).open(cls.backend, threads, np.array(cpus, np.intc), pin, *listen, settings)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        if issubclass(cls.takes, Listening):
            check_cpus(cls.name, parse_listening(cls.name, options, cls.takes).cpus)
        else:
            check_cpus(cls.name, parse_options(cls.name, options, cls.takes).cpus)

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        try:
            reason: str | None = require(cls.name).probe(cls.backend)
        except TransportUnavailable as error:
            return error.reason
        return reason

    def describe(self) -> bytes:
        return self._description

    def can_reach(self, remote: bytes) -> str | None:
        with self._usable() as c:
            reason: str | None = c.can_reach(self._handle, remote)
            return reason

    def register(self, regions: Sequence[Region]) -> None:
        """Raises LocalProtocolError for a kind of memory that this transport never reaches, TransportUnavailable where
        it cannot have this memory."""
        for region in regions:
            if region.kind not in self.traits.memory:
                reached = ", ".join(sorted(self.traits.memory))
                where = f"memory of {region.kind} at {region.address:#x}"
                raise LocalProtocolError(f"{where}: this transport reaches memory of {reached} only")
        pools = [_pool_of(region) for region in regions]
        packed = b"".join(map(_pack_region, regions, pools))
        refs = order_grids(regions)
        grids = b"".join(
            _GRID.pack(
                ref.region,
                ref.grid.group,
                ref.grid.offset,
                ref.grid.block_stride,
                ref.grid.block_bytes,
                ref.grid.num_blocks,
            )
            for ref in refs
        )
        with self._usable() as c:
            self._registered.append((tuple(regions), pools))
            try:
                c.register(self._handle, packed, grids)
            except RuntimeError as error:
                raise TransportUnavailable(self.name, str(error)) from error

    def unregister(self) -> None:
        self.register([])

    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        check_claim(lease, capability)
        check_capability(lease, capability)
        groups = [(group, np.ascontiguousarray(ids, np.uint32)) for group, ids in blocks.items()]
        with self._usable() as c:
            c.grant(self._handle, lease.number, lease.epoch, capability, groups)

    def revoke(self, lease: LeaseId) -> None:
        with self._usable() as c:
            c.revoke(self._handle, lease.number, lease.epoch)

    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        with self._usable() as c:
            c.disconnect(self._handle, self._peers.pop(peer, _NEVER))
            number = next(self._numbers)
            c.connect(self._handle, number, peer, remote, tag)
            self._peers[peer] = number

    def disconnect(self, peer: PeerId) -> None:
        with self._usable() as c:
            c.disconnect(self._handle, self._peers.pop(peer, _NEVER))

    def post_read(
        self, peer: PeerId, lease: LeaseId, capability: bytes, plan: CopyPlan, tag: int, priority: int = 0
    ) -> None:
        check_claim(lease, capability)
        runs, patterns = plan.runs, self._pack(plan.patterns)
        if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.uint32:
            raise LocalProtocolError(f"runs must be uint32 of shape (n, 3), got {runs.dtype} of {runs.shape}")
        with self._usable() as c:
            number = self._peers.get(peer, _NEVER)
            claim = (lease.number, lease.epoch, capability)
            steps = plan.src_step, plan.dst_step
            c.post_read(self._handle, number, *claim, np.ascontiguousarray(runs), patterns, *steps, tag, priority)

    def _pack(self, patterns: tuple[Pattern, ...]) -> bytes:
        """In the order of pd.h; those of most reads are the very same, as planning made them once."""
        with self._lock:
            if (known := self._packed.get(id(patterns))) is None:
                known = self._packed[id(patterns)] = patterns, _pack_patterns(patterns)
                if len(self._packed) > _MAX_PACKED:
                    self._packed.popitem(last=False)
        return known[1]

    def cancel(self, tag: int) -> None:
        with self._usable() as c:
            c.cancel(self._handle, tag)

    def fence(self, peer: PeerId, tag: int) -> None:
        with self._usable() as c:
            c.fence(self._handle, self._peers.get(peer, _NEVER), tag)

    def poll(self, limit: int) -> list[Completion]:
        self._check_process()
        with self._lock:
            if self._closed:
                return []
            return [
                Completion(tag, _STATUS[status], words)
                for tag, status, words in self._native.poll(self._handle, max(limit, 0))
            ]

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork's copy: the threads are the parent's
        with self._lock:
            self._closed = True
            self.abandoned |= self._finish() is False  # None: it was closed before

    def fileno(self) -> int:
        with self._usable():
            return self._fileno

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                f"transport {self.name!r} of agent {self._agent} belongs to process {self._pid}, not to its fork "
                f"{os.getpid()}: create an agent in the child"
            )

    @contextlib.contextmanager
    def _usable(self) -> Iterator[Any]:
        """The extension, for calls on our handle; what C refuses is a LocalProtocolError."""
        self._check_process()
        with self._lock:
            if self._closed:
                raise LocalProtocolError(f"transport {self.name!r} of agent {self._agent} is closed")
            try:
                yield self._native
            except (RuntimeError, OverflowError) as error:
                raise LocalProtocolError(f"transport {self.name!r}: {error}") from error


class ShmTransport(NativeTransport):
    """Between processes of one host, without the kernel's network: see csrc/shm.c."""

    name: ClassVar[str] = "shm"
    backend: ClassVar[str] = "shm"
    takes = NativeOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST}), Scope.HOST)

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_options(cls.name, options, NativeOptions)
        check_cpus(cls.name, parsed.cpus)
        return cls._start(parsed.threads or min(2, _processors(parsed.cpus)), parsed.cpus, parsed.pin, ("", "", 0))


class TcpTransport(NativeTransport):
    """Between hosts, over lanes of plain TCP: see csrc/tcp.h."""

    name: ClassVar[str] = "tcp"
    backend: ClassVar[str] = "tcp"
    takes = TcpOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST}), Scope.NETWORK)

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_listening(cls.name, options, TcpOptions)
        check_cpus(cls.name, parsed.cpus)
        threads = parsed.threads or lanes_here(parsed.cpus)
        return cls._start(threads, parsed.cpus, parsed.pin, addresses(cls.name, parsed))


@cache
def lanes_here(cpus: tuple[int, ...]) -> int:
    """How many lanes of tcp are worth having on these processors (none: on all), by trying once per process: bare TCP
    over the loopback knows what the processors can do, not what a network can."""
    most = _processors(cpus)
    if most <= FEWEST_LANES:
        return most
    figures = require(TcpTransport.name).tcp_lanes(np.array(cpus, np.intc), most)
    chosen = choose_lanes(figures)
    words = ", ".join(f"{lanes}: {gbps:.1f} GB/s" for lanes, gbps in figures)
    logger.info("tcp: %d lanes to every peer (over the loopback %s)", chosen, words)
    return chosen


def choose_lanes(figures: Sequence[tuple[int, float]]) -> int:
    """The fewest lanes that come near the best, of (lanes, GB/s), fewest first: each is a thread and a connection."""
    worthwhile = [(lanes, gbps) for lanes, gbps in figures if lanes >= FEWEST_LANES]
    best = max(gbps for _, gbps in worthwhile)
    return next(lanes for lanes, gbps in worthwhile if gbps >= LANES_NEAR * best)


def _processors(cpus: tuple[int, ...]) -> int:
    return len(cpus) or os.cpu_count() or 1


def check_cpus(name: str, cpus: tuple[int, ...]) -> None:
    """Raises ConfigError for processors that this host does not have."""
    absent = [cpu for cpu in cpus if not os.path.exists(f"/sys/devices/system/cpu/cpu{cpu}")]
    if absent:
        raise ConfigError(f"transport {name!r}: this host has no processor {', '.join(map(str, absent))}")


def addresses(name: str, options: Listening) -> tuple[str, str, int]:
    """(host, advertise, port) as numbers. Raises TransportUnavailable for a name that does not resolve."""
    hosts = ("::" if options.host == "*" else options.host, options.advertise or options.host)
    numeric = []
    for host in hosts:
        try:
            numeric.append(str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]))
        except OSError as error:
            raise TransportUnavailable(name, f"the host name {host!r} does not resolve: {error}") from error
    return numeric[0], numeric[1], options.port


def require(name: str) -> ModuleType:
    found = native()
    if found is None:
        raise TransportUnavailable(
            name,
            "the C extension is not installed: with a C compiler, PD_NATIVE=require pip install says what is missing",
        )
    return found


def _close(extension: Any, handle: Any, registered: list[object], pid: int) -> bool:
    """False: a device may still write."""
    if os.getpid() != pid:
        return True  # a fork's copy: the threads are the parent's
    quiet = bool(extension.close(handle))
    if not quiet:
        logger.error("a device may still write into memory of an agent that is closed: it is kept for ever")
        _abandoned.append(tuple(registered))
    registered.clear()
    return quiet


def _pool_of(region: Region) -> Pool | None:
    return pool_at(region.address, region.length) if region.kind is MemoryKind.HOST else None


def _pack_region(region: Region, pool: Pool | None) -> bytes:
    flags = 0 if region.writable else _READ_ONLY
    fd, offset, whole = -1, 0, 0
    if region.kind is not MemoryKind.HOST:
        flags |= _OF_DEVICE
    if region.dma_buf is not None:
        flags |= _DMA_BUF
        fd, offset = region.dma_buf
        whole = offset + region.length
    elif pool is not None:
        fd, offset, whole = pool.fd, region.address - pool.address, len(pool)
    return _REGION.pack(region.address, region.length, fd, flags, offset, whole, region.device, 0)


def _dims(pattern: Pattern) -> Iterator[int]:
    return chain.from_iterable([_ONCE] * (MAX_DIMS - len(pattern.dims)) + [*pattern.dims])


def _pack_patterns(patterns: Sequence[Pattern]) -> bytes:
    try:
        return b"".join(
            _PATTERN.pack(p.src_grid, p.dst_grid, p.src_offset, p.dst_offset, p.run_bytes, *_dims(p)) for p in patterns
        )
    except struct.error as error:
        raise LocalProtocolError("a pattern of the plan has an impossible grid, offset or size") from error
