"""The owner's half of a staged transport: its device fills slots for readers, which read them over ``inner``.

The order that makes a slot's bytes safe: the block lease is checked, the device copies, the lease is checked again, the
slot is leased to the reader under an epoch of its own. The reader gives it back when it has read it, and its bytes
count only if that epoch, which ends with the block lease, was still held then.

Everything runs in the transport's I/O thread, but for ``revoke``, which must have taken effect when it returns.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zmq

from pd_connector.errors import PDError, RemoteProtocolError
from pd_connector.transport.base import LeaseId, Transport
from pd_connector.transport.device import Device
from pd_connector.transport.device_memory import DeviceMemory
from pd_connector.transport.grants import Grants
from pd_connector.transport.mover import Mover
from pd_connector.transport.slot_pool import SlotPool
from pd_connector.transport.staged_wire import (
    MAX_DETAIL,
    MAX_REQUEST_FRAME,
    Code,
    Filled,
    Held,
    Ping,
    Pong,
    Refused,
    Request,
    Return,
    ToReader,
    Void,
    decode_request,
    encode,
)
from pd_connector.transport.staging import Loan, SlotTable, Verdict
from pd_connector.transport.zmq_sockets import listen

log = logging.getLogger(__name__)

HOLD_S = 15.0
"""How long a reader may keep a slot."""
WAIT_S = 30.0
"""How long a request may wait for one."""
REQUESTS_PER_TURN = 8
LOG_INTERVAL_S = 10.0
_CAPABILITY_BYTES = 16
_VOID = {
    Verdict.REVOKED: (Code.NOT_GRANTED, "the lease ended while the slot was read"),
    Verdict.LATE: (Code.LATE, "the slot was not given back in time"),
    Verdict.UNKNOWN: (Code.LATE, "the slot is not lent to this reader (any more)"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Exposed:
    """What is registered: memory and, unless there is none, the device that moves it."""

    memory: DeviceMemory
    device: Device | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    request: Request
    memory: DeviceMemory  # what it was checked against, whatever is registered by now
    device: Device


class StagedOwner:
    """Binds on construction; raises TransportUnavailable when that fails."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        name: str,
        bind: str,
        instance: bytes,
        grants: Grants,
        pool: SlotPool,
        inner: Transport,
        mover: Mover,
    ) -> None:
        self.exposed = Exposed(DeviceMemory(()))
        self.counters = {
            "slots_filled": 0,
            "slots_late": 0,
            "slots_void": 0,
            "bytes_served": 0,
            "refused": 0,
            "malformed": 0,
            "answers_dropped": 0,
        }
        self._name, self._instance, self._grants = name, instance, grants
        self._pool, self._inner, self._mover = pool, inner, mover
        self._lock = threading.Lock()  # guards the table, and that inner's leases follow it
        self._table: SlotTable[_Asked] = SlotTable(pool.slots, HOLD_S, WAIT_S)
        self._last_line, self._unsaid = -LOG_INTERVAL_S, 0
        self.socket, self.port = listen(context, name, bind, MAX_REQUEST_FRAME)

    def revoke(self, lease: LeaseId) -> None:
        """Thread-safe. On return no slot with bytes of the lease is lent."""
        with self._lock:
            self._grants.remove(lease)
            self._withdraw(self._table.revoke(lease))

    def serve(self) -> None:
        """Take a bounded number of waiting requests."""
        for _ in range(REQUESTS_PER_TURN):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                request = decode_request(frames)
            except RemoteProtocolError as error:
                self._malformed(error)
                continue
            if isinstance(request, Ping):
                self._send(peer, Pong(request.nonce, self._instance))
            elif isinstance(request, Return):
                self._take_back(peer, request)
            else:
                self._ask(peer, request)
        self._fill()

    def due(self) -> float | None:
        """End what time ended; seconds until there is more to end."""
        now = time.monotonic()
        with self._lock:
            deadline = self._table.next_deadline()
            if deadline is None or deadline > now:
                return None if deadline is None else deadline - now
            late, waited = self._table.expire(now)
            self._withdraw(late)
        self.counters["slots_late"] += len(late)
        for peer, asked in waited:
            assert isinstance(peer, bytes)
            self._refuse(peer, asked.request, Code.BUSY, f"no staging slot within {WAIT_S:g} s")
        self._fill()
        return 0.0

    def close(self) -> None:
        self.socket.close(linger=0)

    def _ask(self, peer: bytes, request: Request) -> None:
        memory, device = self.exposed.memory, self.exposed.device
        fault = memory.fault(int(request.blocks.max()), request.parts)
        if fault is None and request.num_bytes > self._pool.slot_bytes:
            fault = f"{request.num_bytes} bytes do not fit a slot of {self._pool.slot_bytes}"
        if fault is not None or device is None:
            self._refuse(peer, request, Code.REFUSED, fault or "nothing is registered")
            return
        asked = _Asked(request, memory, device)
        refusal = self._refusal(asked)
        if refusal is not None:
            self._refuse(peer, request, Code.NOT_GRANTED, refusal)
            return
        with self._lock:
            waits = self._table.ask(peer, request.lease, asked, time.monotonic())
        if not waits:
            self._refuse(peer, request, Code.BUSY, "too many requests wait for a staging slot")

    def _refusal(self, asked: _Asked) -> str | None:
        request = asked.request
        groups = asked.memory.groups(request.parts)
        return self._grants.refusal(request.lease, request.capability, groups, request.blocks)

    def _fill(self) -> None:
        """Have the device fill slots while there are any for those who wait."""
        while True:
            with self._lock:
                loan = self._table.lend()
            if loan is None:
                return
            refusal = self._refusal(loan.request)
            if refusal is None:
                self._start(loan)
            else:
                self._give_up(loan, Code.NOT_GRANTED, refusal)

    def _start(self, loan: Loan[_Asked]) -> None:
        asked, at = loan.request, self._pool.address(loan.slot)
        self._mover.start(
            asked.device,
            lambda: [asked.memory.load(asked.request.blocks, asked.request.parts, at)],
            lambda words: self._filled(loan, words),
        )

    def _filled(self, loan: Loan[_Asked], words: str | None) -> None:
        if words is not None:
            self._give_up(loan, Code.FAILED, f"the owner's device: {words}")
        else:
            capability = secrets.token_bytes(_CAPABILITY_BYTES)
            with self._lock:
                refusal = self._refusal(loan.request)
                if refusal is None and not self._table.filled(loan, time.monotonic()):
                    refusal = "the lease ended while the slot was filled"
                if refusal is None:
                    self._inner.grant(_inner(loan), capability, {0: np.array([loan.slot], np.uint32)})
            if refusal is None:
                self._tell(loan, capability)
            else:
                self._give_up(loan, Code.NOT_GRANTED, refusal)
        self._fill()

    def _tell(self, loan: Loan[_Asked], capability: bytes) -> None:
        request = loan.request.request
        assert isinstance(loan.reader, bytes)
        answer = Filled(request.serial, loan.slot, loan.epoch, capability, request.num_bytes)
        if self._send(loan.reader, answer):
            self.counters["slots_filled"] += 1
            self.counters["bytes_served"] += request.num_bytes
            return
        with self._lock:  # it is gone, or does not take its answers: it cannot know of any slot that it still holds
            self._withdraw([loan, *self._table.forget(loan.reader)])
            self._table.drop(loan)

    def _give_up(self, loan: Loan[_Asked], code: Code, words: str) -> None:
        with self._lock:
            self._table.drop(loan)
        assert isinstance(loan.reader, bytes)
        self._refuse(loan.reader, loan.request.request, code, words)

    def _take_back(self, peer: bytes, message: Return) -> None:
        with self._lock:
            verdict = self._table.give_back(peer, message.slot, message.epoch)
            if verdict is Verdict.HELD:
                self._inner.revoke(LeaseId(message.slot, message.epoch))
        if verdict is Verdict.HELD:
            self._send(peer, Held(message.serial))
        else:
            self.counters["slots_void"] += 1
            self._send(peer, Void(message.serial, *_VOID[verdict]))

    def _withdraw(self, loans: Sequence[Loan[_Asked]]) -> None:
        """Under the lock: nothing more of these loans is read over inner."""
        for loan in loans:
            try:
                self._inner.revoke(_inner(loan))
            except PDError as error:  # inner was closed under us: nothing of it is read any more
                log.debug("%s transport: %s", self._name, error)

    def _refuse(self, peer: bytes, request: Request, code: Code, detail: str) -> None:
        self.counters["refused"] += 1
        self._send(peer, Refused(request.serial, code, detail[:MAX_DETAIL]))

    def _send(self, peer: bytes, message: ToReader) -> bool:
        try:
            self.socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.counters["answers_dropped"] += 1
            return False
        return True

    def _malformed(self, error: RemoteProtocolError) -> None:
        self.counters["malformed"] += 1
        now = time.monotonic()
        if now - self._last_line < LOG_INTERVAL_S:
            self._unsaid += 1
            return
        more = self._unsaid
        log.warning(
            "%s transport: ignored a malformed request (%s); %d more since the last line", self._name, error, more
        )
        self._last_line, self._unsaid = now, 0


def _inner(loan: Loan[_Asked]) -> LeaseId:
    return LeaseId(loan.slot, loan.epoch)
