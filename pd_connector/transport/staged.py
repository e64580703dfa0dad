"""Device memory over any wire: a host transport, ``inner``, reads what devices put into and take out of host memory.

The one background thread of an agent serves peers (staged_owner) and reads from them (staged_reader), two more wait for
the device, one in each direction. Who holds which slot of host memory is decided in staging.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import zmq
from msgspec import Meta, field

from pd_connector.errors import ConfigError, LocalProtocolError, PDError, RemoteProtocolError, TransportUnavailable
from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import LeaseId, PeerId, Scope, Status, Traits
from pd_connector.transport.device import CURRENT, Device, Direction, index_of
from pd_connector.transport.device_memory import DeviceMemory
from pd_connector.transport.grants import check_claim
from pd_connector.transport.mover import Mover
from pd_connector.transport.native import require
from pd_connector.transport.options import Listening, parse_listening
from pd_connector.transport.registry import load
from pd_connector.transport.slot_pool import SlotPool
from pd_connector.transport.staged_owner import Exposed, StagedOwner
from pd_connector.transport.staged_reader import StagedReader
from pd_connector.transport.staged_wire import (
    MAX_DESCRIPTION,
    MAX_SLOT_BYTES,
    MAX_SLOTS,
    VERSION,
    Where,
    decode_where,
    encode,
)
from pd_connector.transport.threaded import ThreadedTransport
from pd_connector.transport.zmq_sockets import endpoint

_abandoned: list[object] = []
"""Memory that a device may still be moving, although it was told to stop: leaked rather than corrupted."""


class StagedOptions(Listening, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Listening is that of the control messages. ``inner`` are the options of the transport that carries the bytes;
    ``slots`` of ``slot_bytes`` to serve from, and as many to read into."""

    inner: dict[str, Any] = field(default_factory=dict)
    slots: Annotated[int, Meta(ge=1, le=MAX_SLOTS // 2)] = 8
    slot_bytes: Annotated[int, Meta(ge=4096, le=MAX_SLOT_BYTES)] = 4 << 20


class StagedTransport(ThreadedTransport):
    inner_name: ClassVar[str]
    implied: ClassVar[tuple[str, ...]] = ("host", "advertise", "cpus")
    """Options of ours that ``inner`` is given too, unless its own say otherwise."""

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        self._options = parse_listening(self.name, options, StagedOptions)
        require(self.name)
        super().__init__(agent, self._options.cpus)
        self._instance = secrets.token_bytes(16)
        self._devices: dict[tuple[MemoryKind, int], Device] = {}
        self._quiet = True
        self._exposed = Exposed(DeviceMemory(()))
        self._pool = SlotPool(self._options.slots, self._options.slot_bytes)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._inner = load(self.inner_name)(f"{agent}/slots", self._inner_options(self._options))
            undo.callback(self._inner.close)
            self._inner.register([self._pool.region])
            self._start()
            self._where = self._describe()
            undo.pop_all()

    @classmethod
    def _inner_options(cls, options: StagedOptions) -> dict[str, Any]:
        return {name: getattr(options, name) for name in cls.implied} | options.inner

    def _describe(self) -> bytes:
        told = endpoint(self._options.advertise or self._options.host, self._owner.port)
        where = encode(Where(VERSION, told, self._instance, self._pool.slot_bytes, self._inner.describe()))
        if len(where) > MAX_DESCRIPTION:
            raise TransportUnavailable(
                self.name, f"its description has {len(where)} bytes, {MAX_DESCRIPTION} may be told"
            )
        return where

    @classmethod
    def suit(cls, options: Mapping[str, Any], regions: Sequence[Region]) -> Mapping[str, Any]:
        inner = options.get("inner", {})
        suited = load(cls.inner_name).suit(inner, regions)
        return options if suited is inner else {**options, "inner": suited}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        load(cls.inner_name).check(cls._inner_options(parse_listening(cls.name, options, StagedOptions)))

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        try:
            parsed = parse_listening(cls.name, options, StagedOptions)
            require(cls.name)
            return load(cls.inner_name).probe(cls._inner_options(parsed))
        except TransportUnavailable as error:
            return error.reason
        except ConfigError as error:
            return str(error)

    def describe(self) -> bytes:
        return self._where

    def can_reach(self, remote: bytes) -> str | None:
        try:
            where = decode_where(remote, self.name)
        except RemoteProtocolError as error:
            return str(error)
        return self._inner.can_reach(where.inner)

    def register(self, regions: Sequence[Region]) -> None:
        """Raises TransportUnavailable where there is no device for such memory, or it is of several."""
        self._check()
        try:
            memory = DeviceMemory(regions)
            device = None if memory.kind is None else self._device(memory.kind, _one_of(regions))
        except LocalProtocolError as error:
            raise TransportUnavailable(self.name, str(error)) from error
        self._exposed = self._owner.exposed = Exposed(memory, device)

    def unregister(self) -> None:
        self.register(())

    def _device(self, kind: MemoryKind, index: int) -> Device:
        with self._lock:
            if (kind, index) not in self._devices:
                device = Device(kind, index)
                try:
                    device.pin(self._pool.region.address, self._pool.region.length)
                except PDError:
                    device.close()
                    raise
                self._devices[kind, index] = device
            return self._devices[kind, index]

    def revoke(self, lease: LeaseId) -> None:
        self._check()
        self._owner.revoke(lease)

    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        self._check()
        try:
            where = decode_where(remote, self.name)
        except RemoteProtocolError as error:
            self._tags.open(tag)
            self._tags.finish(tag, Status.ERROR, f"peer {peer}: {error}")
            return
        self._tags.open(tag)
        self._submit(lambda: self._reader.connect(peer, where, tag))

    def disconnect(self, peer: PeerId) -> None:
        self._submit(lambda: self._reader.disconnect(peer))

    def post_read(
        self, peer: PeerId, lease: LeaseId, capability: bytes, plan: CopyPlan, tag: int, priority: int = 0
    ) -> None:
        self._check()
        memory, device = self._exposed.memory, self._exposed.device
        check_claim(lease, capability)
        memory.check_plan(plan)
        self._tags.open(tag)
        if not plan.num_bytes:
            self._tags.finish(tag, Status.DONE)
            return
        assert device is not None, "a plan that fits has memory to go to"
        self._submit(lambda: self._reader.post(peer, lease, capability, memory, device, plan, tag, priority))

    def cancel(self, tag: int) -> None:
        self._submit(lambda: self._reader.cancel(tag))

    def fence(self, peer: PeerId, tag: int) -> None:
        self._check()
        self._tags.open(tag)
        self._submit(lambda: self._reader.fence(peer, tag))

    def close(self) -> None:
        super().close()
        if os.getpid() != self._pid or self._thread.is_alive():
            return
        self.abandoned = not self._quiet
        if self.abandoned:
            _abandoned.append((self._pool, self._exposed))
            return
        with self._lock:
            devices = list(self._devices.values())
            self._devices.clear()
        for device in devices:
            device.unpin(self._pool.region.address)
            device.close()
        self._pool.close()

    def counters(self) -> dict[str, int]:
        """Totals since start: slots filled, given back late and void, bytes, refusals, malformed messages, dropped
        answers, lost peers."""
        return {**self._owner.counters, **self._reader.counters}

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller) -> None:
        cpus = self._options.cpus
        self._to_host = Mover(f"pd-{self.name}-to-host", cpus, Direction.TO_HOST, self._report)
        self._to_device = Mover(f"pd-{self.name}-to-device", cpus, Direction.TO_DEVICE, self._report)
        bind = endpoint(self._options.host, self._options.port)
        pool, inner = self._pool, self._inner
        self._owner = StagedOwner(context, self.name, bind, self._instance, self._grants, pool, inner, self._to_host)
        self._reader = StagedReader(context, poller, self._tags, pool, inner, self._to_device)
        poller.register(self._owner.socket, zmq.POLLIN)
        poller.register(inner.fileno(), zmq.POLLIN)

    def _handle(self, source: object) -> None:
        if source is self._owner.socket:
            self._owner.serve()
        elif source == self._inner.fileno():
            self._reader.arrived()
        else:
            self._reader.handle(source)

    def _due(self) -> float | None:
        return min((each for each in (self._owner.due(), self._reader.due()) if each is not None), default=None)

    def _shut(self) -> None:
        self._quiet = self._to_device.close() & self._to_host.close()
        self._owner.close()
        self._reader.close()
        self._inner.close()
        self._quiet &= not self._inner.abandoned


def _one_of(regions: Sequence[Region]) -> int:
    """The device that they lie on. Raises LocalProtocolError where that is more than one."""
    numbers = sorted({index_of(region) for region in regions} - {CURRENT})
    if len(numbers) > 1:
        raise LocalProtocolError(f"memory of devices {' and '.join(map(str, numbers))}: an agent serves one")
    return numbers[0] if numbers else CURRENT


class StagedShm(StagedTransport):
    name: ClassVar[str] = "staged-shm"
    inner_name: ClassVar[str] = "shm"
    implied: ClassVar[tuple[str, ...]] = ("cpus",)
    traits: ClassVar[Traits] = Traits(frozenset(MemoryKind), Scope.HOST)


class StagedVerbs(StagedTransport):
    name: ClassVar[str] = "staged-verbs"
    inner_name: ClassVar[str] = "verbs"
    traits: ClassVar[Traits] = Traits(frozenset(MemoryKind), Scope.NETWORK)


class StagedTcp(StagedTransport):
    name: ClassVar[str] = "staged-tcp"
    inner_name: ClassVar[str] = "tcp"
    traits: ClassVar[Traits] = Traits(frozenset(MemoryKind), Scope.NETWORK)


class StagedZmq(StagedTransport):
    name: ClassVar[str] = "staged-zmq"
    inner_name: ClassVar[str] = "zmq"
    instead_of: ClassVar[str] = "staged-tcp"
    traits: ClassVar[Traits] = Traits(frozenset(MemoryKind), Scope.NETWORK)
