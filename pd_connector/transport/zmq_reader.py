"""The reader's half of the zmq transport: peers, their reads and the slices in flight.

Everything here runs in the transport's I/O thread, and so does every write into local memory. A read that this thread
ended is therefore quiet at once: answers that still arrive for it are dropped.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import zmq

from pd_connector.errors import RemoteProtocolError
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import LeaseId, PeerId, Status
from pd_connector.transport.hostmem import Buffer, HostMemory
from pd_connector.transport.slices import Slice, cut, stream_bytes
from pd_connector.transport.tags import TagBook
from pd_connector.transport.zmq_sockets import dial, hang_up, is_lost
from pd_connector.transport.zmq_wire import (
    MAX_ANSWER_FRAME,
    Answer,
    Code,
    Ping,
    Pong,
    Request,
    Where,
    decode_answer,
    encode,
    encode_request,
)

log = logging.getLogger(__name__)

WINDOW_BYTES = 8 << 20
WINDOW_SLICES = 32
"""In flight per peer. The bytes bound what libzmq may buffer; they are few, so that what it received is still in the
caches when it is copied on. The count keeps many small slices below libzmq's queue."""

_STATUS = {Code.NOT_GRANTED: Status.NOT_GRANTED, Code.REFUSED: Status.ERROR}


@dataclass(slots=True, eq=False)
class _Read:
    tag: int
    peer: PeerId
    lease: LeaseId
    capability: bytes
    priority: int
    memory: HostMemory  # what the plan was checked against, whatever is registered by now
    slices: Iterator[Slice]
    left: int  # bytes not yet written
    open: bool = True


@dataclass(slots=True, eq=False)
class _Link:
    """One connection. It is thrown away, never revived: answers of an old one cannot reach a new one."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    nonce: bytes
    next_serial: int = 0
    pending: dict[int, tuple[_Read, Slice]] = field(default_factory=dict)
    in_flight: int = 0


@dataclass(slots=True, eq=False)
class _Peer:
    id: PeerId
    where: Where
    link: _Link | None = None
    connect_tag: int | None = None
    queues: dict[int, deque[_Read]] = field(default_factory=dict)  # per priority, reads that have slices to ask for


class Reader:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller, tags: TagBook) -> None:
        self.counters = {"bytes_read": 0, "malformed_answers": 0, "peers_lost": 0}
        self._context, self._poller, self._tags = context, poller, tags
        self._peers: dict[PeerId, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._handlers: dict[zmq.Socket[bytes], Callable[[], None]] = {}

    def handle(self, socket: object) -> None:
        """A polled socket is readable (or was, before an earlier event of the same turn closed it)."""
        handler = self._handlers.get(socket)  # type: ignore[call-overload]
        if handler is not None:
            handler()

    def _guard(self, handler: Callable[[_Peer, _Link], None], peer: _Peer, link: _Link) -> None:
        """A mistake of ours that one peer brings out costs that peer, not the thread that serves them all."""
        try:
            handler(peer, link)
        except Exception as error:
            log.exception("peer %s is given up", peer.id)
            self._lose(peer, Status.ERROR, f"peer {peer.id}: {type(error).__name__}: {error}")

    def connect(self, peer_id: PeerId, where: Where, tag: int) -> None:
        self.disconnect(peer_id)
        peer = self._peers[peer_id] = _Peer(peer_id, where, connect_tag=tag)
        link = self._open(peer)
        if link is not None:
            link.socket.send(encode(Ping(link.nonce)), zmq.NOBLOCK)

    def disconnect(self, peer_id: PeerId) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            self._end_all(peer, Status.CANCELLED, "disconnected")

    def fence(self, peer_id: PeerId, tag: int) -> None:
        peer = self._peers.get(peer_id)
        if peer is not None:
            self._end_all(peer, Status.CANCELLED, "fenced")
        self._tags.finish(tag, Status.DONE)

    def post(
        self,
        peer_id: PeerId,
        lease: LeaseId,
        capability: bytes,
        memory: HostMemory,
        plan: CopyPlan,
        tag: int,
        priority: int,
    ) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            self._tags.finish(tag, Status.PEER_LOST, f"peer {peer_id} is not connected (or was lost): connect first")
            return
        read = self._reads[tag] = _Read(
            tag, peer_id, lease, capability, priority, memory, cut(plan), stream_bytes(plan)
        )
        peer.queues.setdefault(priority, deque()).append(read)
        self._pump(peer)

    def cancel(self, tag: int) -> None:
        read = self._reads.get(tag)
        if read is not None:
            self._end(read, Status.CANCELLED, "cancelled")

    def close(self) -> None:
        for peer in self._peers.values():
            self._close_link(peer)
        self._peers.clear()
        self._reads.clear()

    def _pump(self, peer: _Peer) -> None:
        """Ask for slices while the window is open: low priority numbers first, equal ones in turn."""
        link = peer.link or self._open(peer)
        if link is None:
            return
        while peer.queues and link.in_flight < WINDOW_BYTES and len(link.pending) < WINDOW_SLICES:
            queue = peer.queues[min(peer.queues)]
            read = queue[0]
            piece = next(read.slices, None)
            if piece is None:
                self._unqueue(peer, read)
                continue
            queue.rotate(-1)
            serial, link.next_serial = link.next_serial, link.next_serial + 1
            link.pending[serial] = (read, piece)
            link.in_flight += piece.num_bytes
            request = Request(serial, read.lease, read.capability, piece.src_blocks, piece.src_parts)
            try:
                link.socket.send_multipart(encode_request(request), zmq.NOBLOCK)
            except zmq.Again:
                # The window is far below the queue's bound: the connection is gone, its event is on the way.
                self._lose(peer, Status.PEER_LOST, f"peer {peer.id} at {peer.where.endpoint} lost: connection closed")
                return

    def _on_answer(self, peer: _Peer, link: _Link) -> None:
        """One message per turn, so that commands wait for one slice at most."""
        try:
            head = link.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        frames = _rest(link.socket, head)
        try:
            answer = decode_answer(head.buffer)
            if isinstance(answer, Pong):
                if sum(1 for _ in frames):
                    raise RemoteProtocolError("a pong with frames")
                self._on_pong(peer, link, answer)
            else:
                self._on_slice(link, answer, frames)
                for _ in frames:
                    pass  # of a read that has ended
        except RemoteProtocolError as error:
            self.counters["malformed_answers"] += 1
            self._lose(peer, Status.ERROR, f"peer {peer.id} broke the protocol: {error}")
        if peer.link is link:
            self._pump(peer)

    def _on_pong(self, peer: _Peer, link: _Link, pong: Pong) -> None:
        if pong.nonce != link.nonce:
            raise RemoteProtocolError("a pong for another ping")
        if pong.instance != peer.where.instance:
            self._lose(peer, Status.PEER_LOST, f"another agent listens at {peer.where.endpoint} now")
        elif peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, Status.DONE)
            peer.connect_tag = None

    def _on_slice(self, link: _Link, answer: Answer, frames: Iterator[Buffer]) -> None:
        if answer.serial >= link.next_serial:
            raise RemoteProtocolError(f"an answer to slice {answer.serial}, which nobody asked for")
        if answer.serial not in link.pending:
            self.counters["malformed_answers"] += 1  # a duplicate: that slice was taken
            return
        read, piece = link.pending.pop(answer.serial)
        link.in_flight -= piece.num_bytes
        if not read.open:
            return
        if answer.code is not Code.OK:
            self._end(read, _STATUS[answer.code], f"peer {read.peer} refused the read: {answer.detail}")
            return
        read.memory.place(piece, frames)
        self.counters["bytes_read"] += piece.num_bytes
        read.left -= piece.num_bytes
        if not read.left:
            self._end(read, Status.DONE, "")

    def _on_monitor(self, peer: _Peer, link: _Link) -> None:
        if not is_lost(link.monitor):
            return
        if peer.connect_tag is None and not link.pending and not peer.queues:
            self._close_link(peer)  # nobody was reading: the next read opens another, and fails if nobody answers
        else:
            state = "lost" if peer.connect_tag is None else "cannot be reached"
            self._lose(peer, Status.PEER_LOST, f"peer {peer.id} at {peer.where.endpoint} {state}: connection closed")

    def _lose(self, peer: _Peer, status: Status, detail: str) -> None:
        self.counters["peers_lost"] += 1
        self._peers.pop(peer.id, None)
        self._end_all(peer, status, detail)

    def _end_all(self, peer: _Peer, status: Status, detail: str) -> None:
        if peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, status, detail)
            peer.connect_tag = None
        peer.queues.clear()
        self._close_link(peer)
        for read in [read for read in self._reads.values() if read.peer == peer.id]:
            self._end(read, status, detail)

    def _end(self, read: _Read, status: Status, detail: str) -> None:
        read.open = False
        del self._reads[read.tag]
        peer = self._peers.get(read.peer)
        if peer is not None:
            self._unqueue(peer, read)
        self._tags.finish(read.tag, status, detail)

    @staticmethod
    def _unqueue(peer: _Peer, read: _Read) -> None:
        queue = peer.queues.get(read.priority)
        if queue is not None and read in queue:
            queue.remove(read)
            if not queue:
                del peer.queues[read.priority]

    def _open(self, peer: _Peer) -> _Link | None:
        try:
            socket, monitor = dial(self._context, peer.where.endpoint, MAX_ANSWER_FRAME)
        except zmq.ZMQError as error:
            remedy = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            detail = f"peer {peer.id}: cannot connect to {peer.where.endpoint}: {error}{remedy}"
            self._lose(peer, Status.PEER_LOST, detail)
            return None
        link = peer.link = _Link(socket, monitor, secrets.token_bytes(16))
        self._handlers[link.socket] = lambda: self._guard(self._on_answer, peer, link)
        self._handlers[link.monitor] = lambda: self._guard(self._on_monitor, peer, link)
        self._poller.register(link.socket, zmq.POLLIN)
        self._poller.register(link.monitor, zmq.POLLIN)
        return link

    def _close_link(self, peer: _Peer) -> None:
        link, peer.link = peer.link, None
        if link is None:
            return
        for socket in (link.socket, link.monitor):
            self._poller.unregister(socket)
            del self._handlers[socket]
        hang_up(link.socket, link.monitor)


def _rest(socket: zmq.Socket[bytes], head: zmq.Frame) -> Iterator[Buffer]:
    """The frames after the first, received one at a time: each is copied and freed while the caches still hold it."""
    more = head.more
    while more:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        more = frame.more
        yield np.frombuffer(frame.buffer, np.uint8)
