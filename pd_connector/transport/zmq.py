"""ZeroMQ over TCP: works everywhere, the fallback of every other transport.

The one background thread of an agent serves peers (zmq_owner) and reads from them (zmq_reader).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import zmq

from pd_connector.errors import RemoteProtocolError
from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import LeaseId, PeerId, Scope, Status, Traits
from pd_connector.transport.grants import check_claim
from pd_connector.transport.hostmem import HostMemory
from pd_connector.transport.options import Listening, parse_listening
from pd_connector.transport.threaded import ThreadedTransport
from pd_connector.transport.zmq_owner import Owner
from pd_connector.transport.zmq_reader import Reader
from pd_connector.transport.zmq_sockets import endpoint
from pd_connector.transport.zmq_wire import VERSION, Where, decode_where


class ZmqTransport(ThreadedTransport):
    name: ClassVar[str] = "zmq"
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST}), Scope.NETWORK)

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        self._options = parse_listening(self.name, options, Listening)
        super().__init__(agent, self._options.cpus)
        self._instance = secrets.token_bytes(16)
        self._memory = HostMemory(())
        self._start()
        self._where = msgspec.msgpack.encode(
            Where(VERSION, endpoint(self._options.advertise or self._options.host, self._owner.port), self._instance)
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        parse_listening(cls.name, options, Listening)

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        return None

    def describe(self) -> bytes:
        return self._where

    def can_reach(self, remote: bytes) -> str | None:
        try:
            decode_where(remote)
        except RemoteProtocolError as error:
            return str(error)
        return None

    def register(self, regions: Sequence[Region]) -> None:
        self._set_memory(HostMemory(regions))

    def unregister(self) -> None:
        self._set_memory(HostMemory(()))

    def revoke(self, lease: LeaseId) -> None:
        self._check()
        self._grants.remove(lease)

    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        self._check()
        try:
            where = decode_where(remote)
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
        memory = self._memory
        check_claim(lease, capability)
        memory.check_plan(plan)
        self._tags.open(tag)
        if plan.num_bytes:
            self._submit(lambda: self._reader.post(peer, lease, capability, memory, plan, tag, priority))
        else:
            self._tags.finish(tag, Status.DONE)

    def cancel(self, tag: int) -> None:
        self._submit(lambda: self._reader.cancel(tag))

    def fence(self, peer: PeerId, tag: int) -> None:
        self._check()
        self._tags.open(tag)
        self._submit(lambda: self._reader.fence(peer, tag))

    def counters(self) -> dict[str, int]:
        """Totals since start: bytes, slices, refusals, malformed messages, dropped answers, lost peers."""
        return {**self._owner.counters, **self._reader.counters}

    def _set_memory(self, memory: HostMemory) -> None:
        self._check()
        self._memory = self._owner.memory = memory

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller) -> None:
        self._owner = Owner(context, endpoint(self._options.host, self._options.port), self._instance, self._grants)
        self._reader = Reader(poller, self._tags, self._report)
        poller.register(self._owner.socket, zmq.POLLIN)

    def _handle(self, source: object) -> None:
        if source is self._owner.socket:
            self._owner.serve()
        elif isinstance(source, int):
            self._reader.handle(source)

    def _due(self) -> float | None:
        return self._reader.due(time.monotonic())

    def _shut(self) -> None:
        self._owner.close()
        self._reader.close()
        self._memory = self._owner.memory = HostMemory(())  # frames that libzmq still holds keep theirs
