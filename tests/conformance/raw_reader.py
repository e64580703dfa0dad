"""A reader of a staged transport that says exactly what a test has it say, to one owner."""

from __future__ import annotations

import numpy as np
import zmq

from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, DEADLINE_S, LEASE
from pd_connector.transport.base import LeaseId
from pd_connector.transport.staged import StagedZmq
from pd_connector.transport.staged_wire import (
    Filled,
    Request,
    Return,
    ToReader,
    decode_answer,
    decode_where,
    encode,
    encode_fill,
)

SLOTS = 4
"""Of the owner, so that they run out soon."""


def counter(owner: LocalOwner, name: str) -> int:
    assert isinstance(owner.transport, StagedZmq)
    return owner.transport.counters()[name]


class Raw:
    """A reader that says exactly what a test has it say, to one owner."""

    def __init__(self, owner: LocalOwner) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(decode_where(owner.describe(), "staged-zmq").endpoint)
        self._serial = 0

    def fill(self, lease: LeaseId = LEASE, block: int = 0, size: int = 4096) -> int:
        self._serial += 1
        blocks = np.array([block], np.uint32)
        self._socket.send_multipart(encode_fill(Request(self._serial, lease, CAPABILITY, blocks, ((0, 0, size),))))
        return self._serial

    def give_back(self, filled: Filled) -> ToReader:
        self._socket.send(encode(Return(filled.serial, filled.slot, filled.epoch)))
        return self.answer()

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def answer(self, within: float = DEADLINE_S) -> ToReader:
        assert self._socket.poll(int(within * 1000)), f"no answer within {within} s"
        return decode_answer(self._socket.recv())

    def filled(self) -> Filled:
        answer = self.answer()
        assert isinstance(answer, Filled), answer
        return answer

    def is_silent(self) -> bool:
        return not self._socket.poll(200)

    def close(self) -> None:
        self._context.destroy(linger=0)
