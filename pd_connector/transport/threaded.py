"""What transports share whose I/O runs in one background thread that holds every ZeroMQ socket of theirs.

Calls reach the thread through a queue and a doorbell, completions come back through the tag book.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import zmq

from pd_connector.errors import LocalProtocolError
from pd_connector.transport.base import Completion, LeasedBlocks, LeaseId, Status, Transport
from pd_connector.transport.doorbell import Doorbell
from pd_connector.transport.grants import Grants
from pd_connector.transport.tags import TagBook

log = logging.getLogger(__name__)

START_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 10.0
SOCKETS = 8192
"""libzmq needs three for a peer of a staged transport; its default, 1023, ends at 340 of them. The bound on peers is
the protocol's."""


class ThreadedTransport(Transport):
    """A subclass calls ``_start`` at the end of its constructor and fills in the four methods that the thread calls."""

    def __init__(self, agent: str, cpus: tuple[int, ...]) -> None:
        self._agent, self._pid, self._cpus = agent, os.getpid(), cpus
        self._tags, self._grants = TagBook(), Grants()
        self._lock = threading.Lock()  # guards the four below
        self._commands: deque[Callable[[], None]] = deque()
        self._bell = Doorbell()
        self._unusable: str | None = None
        self._stop = False
        # A daemon: an agent that nobody closed must not keep its process alive.
        self._thread = threading.Thread(target=self._main, name=f"pd-{self.name}-{agent}", daemon=True)
        self._started: Future[None] = Future()

    def _start(self) -> None:
        """Raises what ``_open`` raised."""
        self._thread.start()
        try:
            self._started.result(START_DEADLINE_S)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller) -> None:
        """Make the sockets."""

    @abstractmethod
    def _handle(self, source: object) -> None:
        """A source of the poller is readable."""

    @abstractmethod
    def _due(self) -> float | None:
        """Do what time demands, between any two waits; seconds until it demands more (None: it does not)."""

    @abstractmethod
    def _shut(self) -> None:
        """On return nothing of ours writes into registered memory any more."""

    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        self._check()
        self._grants.add(lease, capability, blocks)

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
        if self._thread.ident is not None:  # it was started
            self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            # The memory stays pinned by the thread's own references.
            self.abandoned = True
            log.error("%s transport of agent %s did not stop within %g s", self.name, self._agent, CLOSE_DEADLINE_S)
            return
        with self._lock:
            self._bell.close()
        self._tags.close()

    def fileno(self) -> int:
        self._check_process()
        return self._tags.doorbell.fileno()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                f"transport {self.name!r} of agent {self._agent} belongs to process {self._pid}, not to its fork "
                f"{os.getpid()}: create an agent in the child"
            )

    def _check(self) -> None:
        self._check_process()
        if self._unusable is not None:
            raise LocalProtocolError(f"transport {self.name!r} of agent {self._agent} {self._unusable}")

    def _submit(self, command: Callable[[], None]) -> None:
        self._check_process()
        with self._lock:
            self._check()
            self._commands.append(command)
            self._bell.ring()

    def _report(self, command: Callable[[], None]) -> None:
        """As ``_submit``, from a thread of ours: what comes too late has no effect."""
        with self._lock:
            self._commands.append(command)
            self._bell.ring()

    def _main(self) -> None:
        set_affinity(self._cpus, self.name)  # before the first socket: libzmq's threads inherit it
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, SOCKETS)
        try:
            poller = zmq.Poller()
            self._open(context, poller)
            poller.register(self._bell.fileno(), zmq.POLLIN)
        except BaseException as error:
            context.destroy(linger=0)
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while not self._stop:
                self._turn(poller)
        except Exception:
            log.exception("%s transport of agent %s failed", self.name, self._agent)
            with self._lock:
                self._unusable = "failed, see the log: close it and create a new agent"
            self._shut()
            self._tags.finish_all(Status.ERROR, f"the {self.name} transport of this agent failed")
        else:
            self._shut()
        finally:
            context.destroy(linger=0)

    def _turn(self, poller: zmq.Poller) -> None:
        rest = self._due()
        for source, _ in poller.poll(None if rest is None else max(0, int(rest * 1000) + 1)):
            if source != self._bell.fileno():
                self._handle(source)
                continue
            self._bell.clear()
            while self._commands and not self._stop:
                self._commands.popleft()()


def set_affinity(cpus: tuple[int, ...], name: str) -> None:
    """Leave the one core that an engine may have pinned its threads to; the kernel keeps what the cpuset allows."""
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cpus or range(os.cpu_count() or 1))
    except OSError as error:
        log.warning("%s transport: cannot run on cpus %s: %s", name, list(cpus), error)
