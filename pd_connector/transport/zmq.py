"""ZeroMQ over TCP: works everywhere, the fallback of every other transport.

One background thread per agent holds every socket, serves peers (zmq_owner) and reads from them (zmq_reader). Calls
reach it through a queue and a doorbell, completions come back through the tag book.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, ClassVar

import msgspec
import zmq

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import Completion, LeasedBlocks, LeaseId, PeerId, Scope, Status, Traits, Transport
from pd_connector.transport.doorbell import Doorbell
from pd_connector.transport.grants import Grants, check_claim
from pd_connector.transport.hostmem import HostMemory
from pd_connector.transport.options import Listening, parse_listening
from pd_connector.transport.tags import TagBook
from pd_connector.transport.zmq_owner import Owner
from pd_connector.transport.zmq_reader import Reader
from pd_connector.transport.zmq_wire import VERSION, Where, decode_where

log = logging.getLogger(__name__)

START_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 10.0
SOCKETS = 8192
"""libzmq needs three for a peer; its default, 1023, ends at 340 of them. The bound on peers is the protocol's."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))
"""Where glibc's own adjustment ends once a program has freed 32 MiB in one piece (mallopt(3))."""


@cache
def _keep_freed_memory() -> None:
    """For the whole process, once it reads over ZeroMQ. libzmq allocates every frame it receives. Without this, malloc
    gives them back to the kernel, which clears their pages for the next ones: 10,000 to 40,000 page faults, a third of
    the time of a 235 MB read on one core."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such knobs
    if mallopt is not None:
        for knob, value in _KEEP:
            mallopt(knob, value)


class ZmqTransport(Transport):
    name: ClassVar[str] = "zmq"
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST}), Scope.NETWORK)

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        self._options = parse_listening(self.name, options, Listening)
        self._agent, self._pid, self._instance = agent, os.getpid(), secrets.token_bytes(16)
        self._tags, self._grants = TagBook(), Grants()
        self._memory = HostMemory(())
        self._lock = threading.Lock()  # guards the three below
        self._commands: deque[Callable[[], None]] = deque()
        self._bell = Doorbell()
        self._unusable: str | None = None
        self._stop = False
        started: Future[None] = Future()
        # A daemon: an agent that nobody closed must not keep its process alive.
        self._thread = threading.Thread(target=self._main, args=(started,), name=f"pd-zmq-{agent}", daemon=True)
        self._thread.start()
        try:
            started.result(START_DEADLINE_S)
        except BaseException:
            self.close()
            raise
        self._where = msgspec.msgpack.encode(
            Where(VERSION, _endpoint(self._options.advertise or self._options.host, self._owner.port), self._instance)
        )

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

    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        self._check()
        self._grants.add(lease, capability, blocks)

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
        _keep_freed_memory()
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

    def poll(self, limit: int) -> list[Completion]:
        self._check_process()
        return self._tags.take(limit)

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork's copy: the threads and sockets are the parent's
        with self._lock:
            self._unusable = self._unusable or "is closed"
            self._stop = True
            self._bell.ring()
        self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            # The memory stays pinned by the thread's own references, so what it may still write corrupts nobody.
            log.error("zmq transport of agent %s did not stop within %g s", self._agent, CLOSE_DEADLINE_S)
            return
        with self._lock:
            self._bell.close()
        self._tags.close()

    def fileno(self) -> int:
        self._check_process()
        return self._tags.doorbell.fileno()

    def counters(self) -> dict[str, int]:
        """Totals since start: bytes, slices, refusals, malformed messages, dropped answers, lost peers."""
        return {**self._owner.counters, **self._reader.counters}

    def _set_memory(self, memory: HostMemory) -> None:
        self._check()
        self._memory = self._owner.memory = memory

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                f"transport 'zmq' of agent {self._agent} belongs to process {self._pid}, not to its fork "
                f"{os.getpid()}: create an agent in the child"
            )

    def _check(self) -> None:
        self._check_process()
        if self._unusable is not None:
            raise LocalProtocolError(f"transport 'zmq' of agent {self._agent} {self._unusable}")

    def _submit(self, command: Callable[[], None]) -> None:
        self._check_process()
        with self._lock:
            self._check()
            self._commands.append(command)
            self._bell.ring()

    def _main(self, started: Future[None]) -> None:
        _set_affinity(self._options.cpus)  # before the first socket: libzmq's threads inherit it
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, SOCKETS)
        try:
            poller = zmq.Poller()
            bind = _endpoint(self._options.host, self._options.port)
            self._owner = Owner(context, bind, self._instance, self._grants)
            self._reader = Reader(context, poller, self._tags)
            poller.register(self._owner.socket, zmq.POLLIN)
            poller.register(self._bell.fileno(), zmq.POLLIN)
        except BaseException as error:
            context.destroy(linger=0)
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while not self._stop:
                self._turn(poller.poll())
        except Exception:
            log.exception("zmq transport of agent %s failed", self._agent)
            with self._lock:
                self._unusable = "failed, see the log: close it and create a new agent"
            self._tags.finish_all(Status.ERROR, "the zmq transport of this agent failed")
        finally:
            self._owner.close()
            self._reader.close()
            context.destroy(linger=0)

    def _turn(self, ready: Iterable[tuple[Any, int]]) -> None:
        for source, _ in ready:
            if source == self._bell.fileno():
                self._bell.clear()
                while self._commands and not self._stop:
                    self._commands.popleft()()
            elif source is self._owner.socket:
                self._owner.serve()
            else:
                self._reader.handle(source)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port or '*'}" if ":" in host else f"tcp://{host}:{port or '*'}"


def _set_affinity(cpus: tuple[int, ...]) -> None:
    """Leave the one core that an engine may have pinned its threads to; the kernel keeps what the cpuset allows."""
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cpus or range(os.cpu_count() or 1))
    except OSError as error:
        log.warning("zmq transport: cannot run on cpus %s: %s", list(cpus), error)
