"""The reader's half of a staged transport: peers, their reads, and the slices on their way.

A slice is asked for; its owner fills a slot; that is read over ``inner`` into a slot of ours; at once then the owner's
slot is given back and our device puts the bytes in their places. The slice counts when the owner said that the slot was
held until it came back and the device is done. Several slices are on their way, each at another stage.

Everything here runs in the transport's I/O thread, but for the device's moves: they are the only writes into registered
memory, so a read has ended once none of its own runs.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable

import zmq

from pd_connector.errors import RemoteProtocolError
from pd_connector.plan import CopyPlan
from pd_connector.transport.base import Completion, LeaseId, PeerId, Status, Transport
from pd_connector.transport.device import Device
from pd_connector.transport.device_memory import DeviceMemory
from pd_connector.transport.mover import Mover
from pd_connector.transport.slices import cut, stream_bytes
from pd_connector.transport.slot_pool import SlotPool, one_slot
from pd_connector.transport.staged_reads import Link, Peer, Piece, Read, Stage
from pd_connector.transport.staged_wire import (
    MAX_ANSWER_FRAME,
    Code,
    Filled,
    Held,
    Ping,
    Pong,
    Refused,
    Request,
    Return,
    Void,
    Where,
    decode_answer,
    encode,
    encode_fill,
)
from pd_connector.transport.staging import share
from pd_connector.transport.tags import TagBook
from pd_connector.transport.zmq_sockets import dial, hang_up, is_lost

log = logging.getLogger(__name__)

ARRIVE_S = 15.0
"""How long one slot may take to be read; its owner does not wait longer either."""
_BATCH = 64


_STATUS = dict.fromkeys(Code, Status.ERROR) | {Code.NOT_GRANTED: Status.NOT_GRANTED}


class StagedReader:
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        tags: TagBook,
        pool: SlotPool,
        inner: Transport,
        mover: Mover,
    ) -> None:
        self.counters = {"bytes_read": 0, "malformed_answers": 0, "peers_lost": 0}
        self._context, self._poller, self._tags = context, poller, tags
        self._pool, self._inner, self._mover = pool, inner, mover
        self._window = share(pool.slots)
        self._peers: dict[PeerId, Peer] = {}
        self._reads: dict[int, Read] = {}  # until they complete
        self._fences: list[tuple[int, set[int]]] = []
        self._ready: deque[Piece] = deque()  # filled, and waiting for a slot of ours
        self._arriving: dict[int, Piece] = {}  # by tag of inner
        self._connecting: dict[int, Peer] = {}  # by tag of inner
        self._next_tag = 1
        self._handlers: dict[zmq.Socket[bytes], Callable[[], None]] = {}

    def handle(self, socket: object) -> None:
        """A polled socket is readable (or was, before an earlier event of the same turn closed it)."""
        handler = self._handlers.get(socket)  # type: ignore[call-overload]
        if handler is not None:
            handler()

    def connect(self, peer_id: PeerId, where: Where, tag: int) -> None:
        self.disconnect(peer_id)
        inner_tag = self._tag()
        most = min(where.slot_bytes, self._pool.slot_bytes)
        peer = self._peers[peer_id] = Peer(peer_id, where, f"{peer_id}/{inner_tag}", most, connect_tag=tag)
        self._connecting[inner_tag] = peer
        self._inner.connect(peer.inner_name, where.inner, inner_tag)
        link = self._open(peer)
        if link is not None:
            link.socket.send(encode(Ping(link.nonce)), zmq.NOBLOCK)

    def disconnect(self, peer_id: PeerId) -> None:
        peer = self._peers.get(peer_id)
        if peer is not None:
            self._drop(peer, Status.CANCELLED, "disconnected")

    def fence(self, peer_id: PeerId, tag: int) -> None:
        peer = self._peers.get(peer_id)
        if peer is not None and peer.connect_tag is not None:
            self._drop(peer, Status.CANCELLED, "fenced")
        for read in self._of(peer_id):
            self._end(read, Status.CANCELLED, "fenced")
        self._fences.append((tag, {read.tag for read in self._of(peer_id)}))
        self._settle(None)

    def post(
        self,
        peer_id: PeerId,
        lease: LeaseId,
        capability: bytes,
        memory: DeviceMemory,
        device: Device,
        plan: CopyPlan,
        tag: int,
        priority: int,
    ) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            self._tags.finish(tag, Status.PEER_LOST, f"peer {peer_id} is not connected (or was lost): connect first")
            return
        slices, left = cut(plan, peer.most_bytes), stream_bytes(plan, peer.most_bytes)
        read = Read(tag, peer_id, lease, capability, priority, memory, device, plan, slices, left)
        self._reads[tag] = read
        peer.queues.setdefault(priority, deque()).append(read)
        self._pump(peer)

    def cancel(self, tag: int) -> None:
        read = self._reads.get(tag)
        if read is not None:
            self._end(read, Status.CANCELLED, "cancelled")

    def due(self) -> float | None:
        """Give up what took too long; seconds until there is more."""
        now = time.monotonic()
        waiting = [piece for piece in self._arriving.values() if piece.read.ending is None]
        for piece in [piece for piece in waiting if piece.deadline <= now]:
            words = f"peer {piece.read.peer}: a slot did not arrive within {ARRIVE_S:g} s"
            self._end(piece.read, Status.ERROR, words)
        rest = min((piece.deadline for piece in waiting if piece.deadline > now), default=None)
        return None if rest is None else rest - now

    def close(self) -> None:
        for peer in self._peers.values():
            self._close_link(peer)
        self._peers.clear()

    # Slices on their way

    def _pump(self, peer: Peer) -> None:
        """Ask for slices while the window is open: low priority numbers first, equal ones in turn."""
        link = peer.link or (self._open(peer) if peer.queues else None)
        while link is not None and link.open and peer.queues and len(link.pending) < self._window:
            queue = peer.queues[min(peer.queues)]
            read = queue[0]
            piece = next(read.slices, None)
            if piece is None:
                self._unqueue(peer, read)
                continue
            queue.rotate(-1)
            serial, link.next_serial = link.next_serial, link.next_serial + 1
            asked = link.pending[serial] = Piece(serial, read, piece, link)
            read.pieces.add(asked)
            frames = encode_fill(Request(serial, read.lease, read.capability, piece.src_blocks, piece.src_parts))
            try:
                link.socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                # The window is far below the queue's bound: the connection is gone, its event is on the way.
                self._lose(peer, Status.PEER_LOST, f"peer {peer.id} at {peer.where.endpoint} lost: connection closed")

    def _on_filled(self, piece: Piece, answer: Filled) -> None:
        if answer.num_bytes != piece.slice.num_bytes:
            raise RemoteProtocolError(f"{answer.num_bytes} bytes for a slice of {piece.slice.num_bytes}")
        piece.filled, piece.stage = answer, Stage.FILLED
        self._ready.append(piece)

    def _advance(self) -> None:
        """Read filled slots while there are slots of ours to read into."""
        while self._ready:
            piece = self._ready.popleft()
            if piece.read.ending is not None:
                self._give_back(piece)
            elif (slot := self._pool.take()) is not None:
                self._start(piece, slot)
            else:
                self._ready.appendleft(piece)
                return

    def _start(self, piece: Piece, slot: int) -> None:
        filled, peer = piece.filled, self._peers.get(piece.read.peer)
        assert filled is not None
        assert peer is not None, "a peer's reads end before it does"
        piece.slot, piece.inner_tag, piece.deadline = slot, self._tag(), time.monotonic() + ARRIVE_S
        self._arriving[piece.inner_tag] = piece
        lease, plan = LeaseId(filled.slot, filled.epoch), one_slot(filled.slot, slot, filled.num_bytes)
        self._inner.post_read(peer.inner_name, lease, filled.capability, plan, piece.inner_tag, piece.read.priority)

    def arrived(self) -> None:
        """Inner has completions."""
        for completion in self._inner.poll(_BATCH):
            piece = self._arriving.pop(completion.tag, None)
            if piece is not None:
                self._on_arrival(piece, completion)
            elif (peer := self._connecting.pop(completion.tag, None)) is not None:
                self._on_inner_connected(peer, completion)
        self._advance()

    def _on_arrival(self, piece: Piece, completion: Completion) -> None:
        read, slot = piece.read, piece.slot
        assert slot is not None
        self._give_back(piece)
        if read.ending is not None or completion.status is not Status.DONE:
            self._pool.give_back(slot)
            piece.failure = (completion.status, f"peer {read.peer}: {completion.detail}")
            peer = self._peers.get(read.peer)
            if completion.status is Status.PEER_LOST and peer is not None and peer.link is piece.link:
                self._lose(peer, *piece.failure)
            return
        address = self._pool.address(slot)
        read.moving += 1
        piece.job = self._mover.start(
            read.device,
            lambda: read.memory.place(piece.slice, address),
            lambda words: self._on_moved(piece, slot, words),
        )

    def _on_moved(self, piece: Piece, slot: int, words: str | None) -> None:
        read = piece.read
        self._pool.give_back(slot)
        read.moving -= 1
        piece.moved = words is None
        if words is not None:
            self._end(read, Status.ERROR, f"the device of this agent: {words}")
        self._count(piece)
        self._settle(read)
        self._advance()

    def _give_back(self, piece: Piece) -> None:
        """The owner's slot is read, or will not be."""
        piece.stage, filled = Stage.READ, piece.filled
        if not piece.link.open or filled is None:
            return
        try:
            piece.link.socket.send(encode(Return(piece.serial, filled.slot, filled.epoch)), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("peer %s does not take a slot back: its connection is gone", piece.read.peer)

    def _count(self, piece: Piece) -> None:
        read = piece.read
        if not (piece.held and piece.moved) or read.ending is not None:
            return
        read.pieces.discard(piece)
        self.counters["bytes_read"] += piece.slice.num_bytes
        read.left -= piece.slice.num_bytes
        if not read.left:
            self._end(read, Status.DONE, "")

    # Answers

    def _on_answer(self, peer: Peer, link: Link) -> None:
        """One message per turn, so that commands wait for one slice at most."""
        try:
            frames = link.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        try:
            if len(frames) != 1:
                raise RemoteProtocolError(f"an answer of {len(frames)} frames")
            answer = decode_answer(frames[0])
            if isinstance(answer, Pong):
                self._on_pong(peer, link, answer)
            else:
                self._on_slice(link, answer)
        except RemoteProtocolError as error:
            self.counters["malformed_answers"] += 1
            self._lose(peer, Status.ERROR, f"peer {peer.id} broke the protocol: {error}")
        self._advance()
        if peer.link is link:
            self._pump(peer)

    def _on_slice(self, link: Link, answer: Filled | Refused | Held | Void) -> None:
        piece = link.pending.get(answer.serial)
        expected = Stage.ASKED if isinstance(answer, Filled | Refused) else Stage.READ
        if piece is None or piece.stage is not expected:
            raise RemoteProtocolError(f"{type(answer).__name__} for slice {answer.serial}, which is not due")
        if isinstance(answer, Filled):
            self._on_filled(piece, answer)
            return
        del link.pending[answer.serial]
        read = piece.read
        if read.ending is not None:
            return
        if isinstance(answer, Refused | Void):
            self._end(read, _STATUS[answer.code], f"peer {read.peer} refused the read: {answer.detail}")
        elif piece.failure is not None:
            self._end(read, *piece.failure)
        else:
            piece.held = True
            self._count(piece)

    def _on_pong(self, peer: Peer, link: Link, pong: Pong) -> None:
        if pong.nonce != link.nonce:
            raise RemoteProtocolError("a pong for another ping")
        if pong.instance != peer.where.instance:
            self._lose(peer, Status.PEER_LOST, f"another agent listens at {peer.where.endpoint} now")
            return
        peer.greeted = True
        self._connected(peer)

    def _on_inner_connected(self, peer: Peer, completion: Completion) -> None:
        if self._peers.get(peer.id) is not peer:
            return
        if completion.status is not Status.DONE:
            self._lose(peer, completion.status, f"peer {peer.id}: {completion.detail}")
            return
        peer.inner_connected = True
        self._connected(peer)

    def _connected(self, peer: Peer) -> None:
        if peer.greeted and peer.inner_connected and peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, Status.DONE)
            peer.connect_tag = None

    def _on_monitor(self, peer: Peer, link: Link) -> None:
        if not is_lost(link.monitor):
            return
        if peer.connect_tag is None and not link.pending and not peer.queues:
            self._close_link(peer)  # nobody was reading: the next read opens another, and fails if nobody answers
        else:
            state = "lost" if peer.connect_tag is None else "cannot be reached"
            self._lose(peer, Status.PEER_LOST, f"peer {peer.id} at {peer.where.endpoint} {state}: connection closed")

    # Endings

    def _end(self, read: Read, status: Status, detail: str) -> None:
        """It asks for nothing more and starts nothing more; it completes when nothing of it moves."""
        if read.ending is not None:
            return
        read.ending = (status, detail)
        peer = self._peers.get(read.peer)
        if peer is not None:
            self._unqueue(peer, read)
        for piece in read.pieces:
            if piece.inner_tag in self._arriving:
                assert piece.inner_tag is not None
                self._inner.cancel(piece.inner_tag)
            if piece.job is not None:
                piece.job.cancel()
        read.pieces.clear()
        self._settle(read)

    def _settle(self, read: Read | None) -> None:
        """Complete a read, and the fences that waited for it, once nothing of it moves."""
        if read is not None and read.ending is not None and not read.moving and read.tag in self._reads:
            del self._reads[read.tag]
            self._tags.finish(read.tag, *read.ending)
            for _, tags in self._fences:
                tags.discard(read.tag)
        for tag, tags in self._fences:
            if not tags:
                self._tags.finish(tag, Status.DONE)
        self._fences = [(tag, tags) for tag, tags in self._fences if tags]

    def _of(self, peer_id: PeerId) -> list[Read]:
        return [read for read in self._reads.values() if read.peer == peer_id]

    def _lose(self, peer: Peer, status: Status, detail: str) -> None:
        self.counters["peers_lost"] += 1
        self._drop(peer, status, detail)

    def _drop(self, peer: Peer, status: Status, detail: str) -> None:
        """Forget a peer: what it was doing ends so."""
        if self._peers.get(peer.id) is peer:
            del self._peers[peer.id]
        if peer.connect_tag is not None:
            self._tags.finish(peer.connect_tag, status, detail)
            peer.connect_tag = None
        peer.queues.clear()
        for read in self._of(peer.id):
            self._end(read, status, detail)
        self._close_link(peer)
        self._inner.disconnect(peer.inner_name)

    @staticmethod
    def _unqueue(peer: Peer, read: Read) -> None:
        queue = peer.queues.get(read.priority)
        if queue is not None and read in queue:
            queue.remove(read)
            if not queue:
                del peer.queues[read.priority]

    # Connections

    def _open(self, peer: Peer) -> Link | None:
        try:
            socket, monitor = dial(self._context, peer.where.endpoint, MAX_ANSWER_FRAME)
        except zmq.ZMQError as error:
            self._lose(peer, Status.PEER_LOST, f"peer {peer.id}: cannot connect to {peer.where.endpoint}: {error}")
            return None
        link = peer.link = Link(socket, monitor, secrets.token_bytes(16))
        self._handlers[socket] = lambda: self._guard(self._on_answer, peer, link)
        self._handlers[monitor] = lambda: self._guard(self._on_monitor, peer, link)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        return link

    def _guard(self, handler: Callable[[Peer, Link], None], peer: Peer, link: Link) -> None:
        """A mistake of ours that one peer brings out costs that peer, not the thread that serves them all."""
        try:
            handler(peer, link)
        except Exception as error:
            log.exception("peer %s is given up", peer.id)
            self._lose(peer, Status.ERROR, f"peer {peer.id}: {type(error).__name__}: {error}")

    def _close_link(self, peer: Peer) -> None:
        link, peer.link = peer.link, None
        if link is None:
            return
        link.open = False
        link.pending.clear()
        for socket in (link.socket, link.monitor):
            self._poller.unregister(socket)
            del self._handlers[socket]
        hang_up(link.socket, link.monitor)

    def _tag(self) -> int:
        self._next_tag += 1
        return self._next_tag
