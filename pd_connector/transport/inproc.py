"""Reads between agents of one process: the executable specification of a transport.

Nothing runs in the background. ``poll`` does the work, one slice per call, and keeps ``fileno`` readable while work is
left, so cancel and fence can come between any two slices as they can over a wire.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import msgspec

from pd_connector.errors import ConfigError, LocalProtocolError
from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import Completion, LeasedBlocks, LeaseId, PeerId, Scope, Status, Traits, Transport
from pd_connector.transport.grants import Grants, check_claim
from pd_connector.transport.hostmem import HostMemory
from pd_connector.transport.slices import Slice, cut, stream_bytes
from pd_connector.transport.tags import TagBook

_agents: WeakValueDictionary[bytes, InprocTransport] = WeakValueDictionary()
_agents_lock = threading.Lock()


class _Where(msgspec.Struct, frozen=True, array_like=True):
    pid: int
    token: bytes


@dataclass(slots=True, eq=False)
class _Read:
    tag: int
    peer: PeerId
    lease: LeaseId
    capability: bytes
    memory: HostMemory  # what the plan was checked against, whatever is registered by now
    slices: Iterator[Slice]
    left: int  # bytes not yet written


class InprocTransport(Transport):
    name: ClassVar[str] = "inproc"
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST}), Scope.PROCESS)

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        if options:
            raise ConfigError(f"transport 'inproc' has no options, got {', '.join(map(repr, options))}: remove them")
        self._agent, self._pid, self._token = agent, os.getpid(), secrets.token_bytes(16)
        # Reads are advanced, ended and completed under this lock: who holds it knows that no byte is being written.
        self._lock = threading.RLock()
        self._memory = HostMemory(())
        self._grants = Grants()
        self._peers: dict[PeerId, bytes] = {}
        self._queues: dict[int, deque[_Read]] = {}  # per priority, served in turn
        self._tags = TagBook()
        self._closed = False
        with _agents_lock:
            _agents[self._token] = self

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        return None

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Where(self._pid, self._token))

    def can_reach(self, remote: bytes) -> str | None:
        try:
            where = msgspec.msgpack.decode(remote, type=_Where)
        except msgspec.DecodeError as error:
            return f"the peer's description is not one of inproc: {error}"
        if where.pid != os.getpid():
            return f"the peer lives in process {where.pid}, this one is {os.getpid()}"
        if _find(where.token) is None:
            return "no such agent in this process (closed, or inherited across fork)"
        return None

    def register(self, regions: Sequence[Region]) -> None:
        with self._usable():
            self._memory = HostMemory(regions)

    def unregister(self) -> None:
        with self._usable():
            self._memory = HostMemory(())

    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        with self._usable():
            self._grants.add(lease, capability, blocks)

    def revoke(self, lease: LeaseId) -> None:
        with self._usable():
            self._grants.remove(lease)

    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        with self._usable():
            self._tags.open(tag)
            reason = self.can_reach(remote)
            if reason is None:
                self._peers[peer] = msgspec.msgpack.decode(remote, type=_Where).token
            self._tags.finish(tag, Status.DONE if reason is None else Status.PEER_LOST, reason or "")

    def disconnect(self, peer: PeerId) -> None:
        with self._usable():
            self._end(lambda read: read.peer == peer, Status.CANCELLED, "disconnected")
            self._peers.pop(peer, None)

    def post_read(
        self, peer: PeerId, lease: LeaseId, capability: bytes, plan: CopyPlan, tag: int, priority: int = 0
    ) -> None:
        with self._usable():
            check_claim(lease, capability)
            self._memory.check_plan(plan)
            self._tags.open(tag)
            if peer not in self._peers:
                self._tags.finish(tag, Status.PEER_LOST, f"peer {peer} is not connected")
            elif not plan.num_bytes:
                self._tags.finish(tag, Status.DONE)
            else:
                read = _Read(tag, peer, lease, capability, self._memory, cut(plan), stream_bytes(plan))
                self._queues.setdefault(priority, deque()).append(read)
                self._tags.doorbell.ring()

    def cancel(self, tag: int) -> None:
        with self._usable():
            self._end(lambda read: read.tag == tag, Status.CANCELLED, "cancelled")

    def fence(self, peer: PeerId, tag: int) -> None:
        with self._usable():
            self._tags.open(tag)
            self._end(lambda read: read.peer == peer, Status.CANCELLED, "fenced")
            self._tags.finish(tag, Status.DONE)

    def poll(self, limit: int) -> list[Completion]:
        self._check_process()
        with self._lock:
            self._advance()
            return self._tags.take(limit, rearm=bool(self._queues))

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with _agents_lock:
            _agents.pop(self._token, None)
        with self._lock:
            self._closed = True
            self._queues.clear()
            self._grants.clear()
            self._tags.close()

    def fileno(self) -> int:
        self._check_process()
        return self._tags.doorbell.fileno()

    def _advance(self) -> None:
        """Copy one slice of the read whose turn it is."""
        if not self._queues:
            return
        queue = self._queues[min(self._queues)]
        read = queue[0]
        queue.rotate(-1)
        piece = next(read.slices)
        status, detail = self._copy(read, piece)
        read.left -= piece.num_bytes
        if status is not Status.DONE or not read.left:
            self._end(lambda other: other is read, status, detail)

    def _copy(self, read: _Read, piece: Slice) -> tuple[Status, str]:
        owner = _find(self._peers[read.peer])
        if owner is None:
            return Status.PEER_LOST, f"peer {read.peer} is closed"
        memory = owner._memory
        fault = memory.fault(int(piece.src_blocks.max()), piece.src_parts)
        if fault is not None:
            return Status.ERROR, f"peer {read.peer} refuses the read: {fault}"
        groups = memory.groups(piece.src_parts)
        refusal = owner._grants.refusal(read.lease, read.capability, groups, piece.src_blocks)
        if refusal is not None:
            return Status.NOT_GRANTED, refusal
        source = memory.load(piece.src_blocks, piece.src_parts)
        read.memory.place(piece, source)
        return Status.DONE, ""

    def _end(self, which: Any, status: Status, detail: str) -> None:
        for priority, queue in list(self._queues.items()):
            for read in [read for read in queue if which(read)]:
                queue.remove(read)
                self._tags.finish(read.tag, status, detail)
            if not queue:
                del self._queues[priority]

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                f"transport 'inproc' of agent {self._agent} belongs to process {self._pid}, not to its fork "
                f"{os.getpid()}: create an agent in the child"
            )

    def _usable(self) -> threading.RLock:
        self._check_process()
        if self._closed:
            raise LocalProtocolError(f"transport 'inproc' of agent {self._agent} is closed")
        return self._lock


def _find(token: bytes) -> InprocTransport | None:
    with _agents_lock:
        agent = _agents.get(token)
    # A fork inherits the entries of its parent's agents.
    return agent if agent is not None and agent._pid == os.getpid() else None
