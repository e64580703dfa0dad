"""The reader's half of the zmq transport: peers, their reads and the slices in flight.

Everything here runs in the transport's I/O thread, and so does every write into local memory: the kernel puts bytes
where they belong while this thread asks it for them. A read that this thread ended is therefore quiet at once: what
still arrives for it is dropped, the rest of a slice that has begun to come included.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
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
from pd_connector.transport.zmq_link import Address, Head, Link, LinkLost, resolve
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
"""In flight per peer: as much as keeps the owner busy. The count keeps many small slices below its queue."""
SILENCE_S = 15.0
"""After which a peer is given up that says nothing; it is asked to after a third of that."""

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
class _Arrival:
    """The slice whose bytes are coming. ``whole`` takes those that have no place of their own until all are there."""

    read: _Read
    piece: Slice
    whole: Buffer | None


@dataclass(slots=True, eq=False)
class _Line:
    """A link and what was asked for over it."""

    link: Link
    nonce: bytes
    next_serial: int = 0
    pending: dict[int, tuple[_Read, Slice]] = field(default_factory=dict)
    in_flight: int = 0
    arrival: _Arrival | None = None
    watched: int = 0  # for which events of its socket
    proven: bool = False  # a pong told that the peer's own instance is there


@dataclass(slots=True, eq=False)
class _Peer:
    id: PeerId
    where: Where
    address: Address | None = None  # while its name is looked up
    line: _Line | None = None
    connect_tag: int | None = None
    queues: dict[int, deque[_Read]] = field(default_factory=dict)  # per priority, reads that have slices to ask for


class Reader:
    def __init__(self, poller: zmq.Poller, tags: TagBook, report: Callable[[Callable[[], None]], None]) -> None:
        """``report`` has the transport's thread call something; it may itself be called from any."""
        self.counters = {"bytes_read": 0, "malformed_answers": 0, "peers_lost": 0}
        self._poller, self._tags, self._report = poller, tags, report
        self._peers: dict[PeerId, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._by_socket: dict[int, tuple[_Peer, _Line]] = {}
        self._next_look = 0.0

    def handle(self, descriptor: int) -> None:
        """A polled socket is ready (or was, before an earlier event of the same turn closed it)."""
        if descriptor in self._by_socket:
            self._guard(self._on_ready, *self._by_socket[descriptor])

    def due(self, now: float) -> float | None:
        """Ask silent peers, give up those that do not answer; seconds until it is to be called again."""
        if not self._by_socket:
            return None
        if now >= self._next_look:
            self._next_look = now + SILENCE_S / 3
            for peer, line in list(self._by_socket.values()):
                if line.link.in_handshake and now - line.link.made > SILENCE_S:
                    self._hung_up(peer, line, f"no handshake within {SILENCE_S:g} s")
                elif now - line.link.heard > SILENCE_S / 3:
                    self._guard(lambda peer, line: self._on_silence(peer, line, now), peer, line)
        return self._next_look - now

    def _guard(self, handler: Callable[[_Peer, _Line], None], peer: _Peer, line: _Line) -> None:
        """A mistake of ours that one peer brings out costs that peer, not the thread that serves them all."""
        try:
            handler(peer, line)
        except LinkLost as error:
            self._hung_up(peer, line, str(error))
        except RemoteProtocolError as error:
            self.counters["malformed_answers"] += 1
            self._lose(peer, Status.ERROR, f"peer {peer.id} broke the protocol: {error}")
        except Exception as error:
            log.exception("peer %s is given up", peer.id)
            self._lose(peer, Status.ERROR, f"peer {peer.id}: {type(error).__name__}: {error}")

    def connect(self, peer_id: PeerId, where: Where, tag: int) -> None:
        self.disconnect(peer_id)
        peer = self._peers[peer_id] = _Peer(peer_id, where, connect_tag=tag)
        try:
            peer.address = resolve(where.endpoint, look_up=False)
        except (OSError, ValueError) as error:
            self._cannot_open(peer, error)
            return
        if peer.address is not None:
            self._open(peer)
        else:
            # A daemon of its own: a name server may take half a minute, and nobody waits for it here.
            threading.Thread(target=self._look_up, args=(peer,), name="pd-zmq-name", daemon=True).start()

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
        line = peer.line or self._open(peer)
        if line is not None:
            self._guard(self._pump, peer, line)

    def cancel(self, tag: int) -> None:
        read = self._reads.get(tag)
        if read is not None:
            self._end(read, Status.CANCELLED, "cancelled")

    def close(self) -> None:
        for peer in self._peers.values():
            self._hang_up(peer)
        self._peers.clear()
        self._reads.clear()

    def _pump(self, peer: _Peer, line: _Line) -> None:
        """Ask for slices while the window is open: low priority numbers first, equal ones in turn."""
        while line.proven and peer.queues and line.in_flight < WINDOW_BYTES and len(line.pending) < WINDOW_SLICES:
            queue = peer.queues[min(peer.queues)]
            read = queue[0]
            piece = next(read.slices, None)
            if piece is None:
                self._unqueue(peer, read)
                continue
            queue.rotate(-1)
            serial, line.next_serial = line.next_serial, line.next_serial + 1
            line.pending[serial] = (read, piece)
            line.in_flight += piece.num_bytes
            request = Request(serial, read.lease, read.capability, piece.src_blocks, piece.src_parts)
            line.link.send(encode_request(request))
        self._watch(line)

    def _on_silence(self, peer: _Peer, line: _Line, now: float) -> None:
        """It may be ours: this thread was held up, or waits for more bytes than have come."""
        self._on_ready(peer, line)
        if peer.line is not line:
            return
        if now - line.link.heard > SILENCE_S:
            raise LinkLost(f"nothing came for {SILENCE_S:g} s")
        line.link.ping()
        self._watch(line)

    def _on_ready(self, peer: _Peer, line: _Line) -> None:
        for event in line.link.events():
            if isinstance(event, Head):
                self._on_head(peer, line, event)
            else:
                self._on_end(line)
            if peer.line is line:
                self._pump(peer, line)
        if peer.line is line:
            self._watch(line)

    def _on_head(self, peer: _Peer, line: _Line, head: Head) -> None:
        answer = decode_answer(head.frame)
        if not isinstance(answer, Pong):
            self._on_answer(line, answer)
        elif head.more:
            raise RemoteProtocolError("a pong with frames")
        else:
            self._on_pong(peer, line, answer)

    def _on_pong(self, peer: _Peer, line: _Line, pong: Pong) -> None:
        if pong.nonce != line.nonce:
            raise RemoteProtocolError("a pong for another ping")
        if pong.instance != peer.where.instance:
            self._lose(peer, Status.PEER_LOST, f"another agent listens at {peer.where.endpoint} now")
            return
        line.proven = True
        if peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, Status.DONE)
            peer.connect_tag = None

    def _on_answer(self, line: _Line, answer: Answer) -> None:
        if answer.serial >= line.next_serial:
            raise RemoteProtocolError(f"an answer to slice {answer.serial}, which nobody asked for")
        if answer.serial not in line.pending:
            self.counters["malformed_answers"] += 1  # a duplicate: that slice was taken
            return
        read, piece = line.pending.pop(answer.serial)
        line.in_flight -= piece.num_bytes
        if not read.open:
            return
        if answer.code is not Code.OK:
            self._end(read, _STATUS[answer.code], f"peer {read.peer} refused the read: {answer.detail}")
            return
        places, whole = read.memory.places(piece), None
        if places is None:
            whole = np.empty(piece.num_bytes, np.uint8)
            places = [whole]
        line.arrival = _Arrival(read, piece, whole)
        line.link.expect(place.data for place in places)

    def _on_end(self, line: _Line) -> None:
        arrival, line.arrival = line.arrival, None
        if arrival is None:
            return
        read, piece = arrival.read, arrival.piece
        if arrival.whole is not None:
            read.memory.put(piece, arrival.whole)
        self.counters["bytes_read"] += piece.num_bytes
        read.left -= piece.num_bytes
        if not read.left:
            self._end(read, Status.DONE, "")

    def _hung_up(self, peer: _Peer, line: _Line, why: str) -> None:
        if peer.connect_tag is None and not line.pending and not line.arrival and not peer.queues:
            self._hang_up(peer)  # nobody was reading: the next read opens another, and fails if nobody answers
        else:
            state = "lost" if peer.connect_tag is None else "cannot be reached"
            self._lose(peer, Status.PEER_LOST, f"peer {peer.id} at {peer.where.endpoint} {state}: {why}")

    def _lose(self, peer: _Peer, status: Status, detail: str) -> None:
        self.counters["peers_lost"] += 1
        self._peers.pop(peer.id, None)
        self._end_all(peer, status, detail)

    def _end_all(self, peer: _Peer, status: Status, detail: str) -> None:
        if peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, status, detail)
            peer.connect_tag = None
        peer.queues.clear()
        self._hang_up(peer)
        for read in [read for read in self._reads.values() if read.peer == peer.id]:
            self._end(read, status, detail)

    def _end(self, read: _Read, status: Status, detail: str) -> None:
        read.open = False
        del self._reads[read.tag]
        peer = self._peers.get(read.peer)
        if peer is not None:
            self._unqueue(peer, read)
            if peer.line is not None and peer.line.arrival is not None and peer.line.arrival.read is read:
                peer.line.arrival = None
                peer.line.link.drop()
        self._tags.finish(read.tag, status, detail)

    @staticmethod
    def _unqueue(peer: _Peer, read: _Read) -> None:
        queue = peer.queues.get(read.priority)
        if queue is not None and read in queue:
            queue.remove(read)
            if not queue:
                del peer.queues[read.priority]

    def _look_up(self, peer: _Peer) -> None:
        """In a thread of its own."""
        try:
            address = resolve(peer.where.endpoint, look_up=True)
        except (OSError, ValueError) as error:
            failure = error
            self._report(lambda: self._found(peer, None, failure))
        else:
            self._report(lambda: self._found(peer, address, None))

    def _found(self, peer: _Peer, address: Address | None, failure: Exception | None) -> None:
        if self._peers.get(peer.id) is not peer:
            return  # nobody waits for it any more
        if failure is not None:
            self._cannot_open(peer, failure)
            return
        peer.address = address
        line = self._open(peer)
        if line is not None:
            self._guard(self._pump, peer, line)

    def _cannot_open(self, peer: _Peer, error: Exception) -> None:
        remedy = "; raise the limit of open files (ulimit -n)" if getattr(error, "errno", 0) == errno.EMFILE else ""
        detail = f"peer {peer.id}: cannot connect to {peer.where.endpoint}: {error}{remedy}"
        self._lose(peer, Status.PEER_LOST, detail)

    def _open(self, peer: _Peer) -> _Line | None:
        """None while its name is looked up, and when it is lost instead."""
        if peer.address is None:
            return None
        try:
            link = Link(peer.address, MAX_ANSWER_FRAME)
        except OSError as error:
            self._cannot_open(peer, error)
            return None
        line = peer.line = _Line(link, secrets.token_bytes(16))
        self._by_socket[link.fileno()] = (peer, line)
        link.send([encode(Ping(line.nonce))])
        self._watch(line)
        return line

    def _watch(self, line: _Line) -> None:
        events = zmq.POLLIN | (zmq.POLLOUT if line.link.wants_to_write else 0)
        if events != line.watched:
            self._poller.register(line.link.fileno(), events)
            line.watched = events

    def _hang_up(self, peer: _Peer) -> None:
        line, peer.line = peer.line, None
        if line is not None:
            self._poller.unregister(line.link.fileno())
            del self._by_socket[line.link.fileno()]
            line.link.close()
