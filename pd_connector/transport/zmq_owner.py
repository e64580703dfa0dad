"""The owner's half of the zmq transport: answers requests for slices straight from leased block memory.

Everything here runs in the transport's I/O thread; only ``memory`` and the grants are touched from outside.
Known limit of libzmq: the parts of one unfinished message are not counted by its high-water mark, so whoever can
connect can fill memory. Bind to interfaces whose peers are trusted that far.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import zmq

from pd_connector.errors import RemoteProtocolError
from pd_connector.transport.grants import Grants
from pd_connector.transport.hostmem import HostMemory
from pd_connector.transport.zmq_sockets import listen
from pd_connector.transport.zmq_wire import (
    MAX_DETAIL,
    MAX_REQUEST_FRAME,
    Answer,
    Code,
    Ping,
    Pong,
    Request,
    decode_request,
    encode,
)

log = logging.getLogger(__name__)

REQUESTS_PER_TURN = 8
LOG_INTERVAL_S = 10.0


class Owner:
    """Binds on construction; raises TransportUnavailable when that fails."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], bind: str, instance: bytes, grants: Grants) -> None:
        self.memory = HostMemory(())
        self.counters = {
            "bytes_served": 0,
            "slices_served": 0,
            "frames_served": 0,
            "refused": 0,
            "malformed": 0,
            "answers_dropped": 0,
        }
        self._grants, self._instance = grants, instance
        self._last_line, self._unsaid = -LOG_INTERVAL_S, 0
        self.socket, self.port = listen(context, "zmq", bind, MAX_REQUEST_FRAME)

    def serve(self) -> None:
        """Answer a bounded number of waiting requests."""
        for _ in range(REQUESTS_PER_TURN):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = decode_request(frames)
            except RemoteProtocolError as error:
                self._malformed(error)
                continue
            if isinstance(request, Ping):
                self._send([peer, encode(Pong(request.nonce, self._instance))])
            else:
                self._answer(peer, request)

    def close(self) -> None:
        self.socket.close(linger=0)

    def _answer(self, peer: bytes, request: Request) -> None:
        memory = self.memory
        fault = memory.fault(int(request.blocks.max()), request.parts)
        if fault is not None:
            self._refuse(peer, request, Code.REFUSED, fault)
            return
        groups = memory.groups(request.parts)
        refusal = self._grants.refusal(request.lease, request.capability, groups, request.blocks)
        if refusal is not None:
            self._refuse(peer, request, Code.NOT_GRANTED, refusal)
            return
        frames = memory.load(request.blocks, request.parts)
        if self._send([peer, encode(Answer(request.serial, Code.OK)), *(frame.data for frame in frames)]):
            self.counters["slices_served"] += 1
            self.counters["frames_served"] += len(frames)
            self.counters["bytes_served"] += sum(map(len, frames))

    def _refuse(self, peer: bytes, request: Request, code: Code, detail: str) -> None:
        self.counters["refused"] += 1
        self._send([peer, encode(Answer(request.serial, code, detail[:MAX_DETAIL]))])

    def _send(self, frames: Sequence[memoryview | bytes]) -> bool:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            # The peer is gone or does not take its answers: its own deadline ends the read, ours goes on.
            self.counters["answers_dropped"] += 1
            return False
        return True

    def _malformed(self, error: RemoteProtocolError) -> None:
        self.counters["malformed"] += 1
        now = time.monotonic()
        if now - self._last_line < LOG_INTERVAL_S:
            self._unsaid += 1
            return
        log.warning("zmq transport: ignored a malformed request (%s); %d more since the last line", error, self._unsaid)
        self._last_line, self._unsaid = now, 0
