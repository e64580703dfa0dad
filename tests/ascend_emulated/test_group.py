"""libhccl.so emulated: operations of two ranks on their streams, and what becomes of them without the partner."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from .libraries import (
    Board,
    RootInfo,
    SendRecvItem,
    load,
    made,
)
from .processes import in_thread, peer

MIB = 1 << 20
SYNC_TIMEOUT, INTERNAL = 107020, 507899


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "20")


def rank_one(pipe: Connection, info: bytes) -> None:
    """Does what the pipe says, one operation at a time."""
    os.environ["HCCL_EXEC_TIMEOUT"] = "1"
    board, hccl = Board(1), load("hccl")
    group = made(hccl.HcclCommInitRootInfo, 2, ctypes.byref(RootInfo.from_buffer_copy(info)), 1)
    stream, buffer = board.stream(), board.malloc(MIB)
    while True:
        try:
            command, argument = pipe.recv()
        except EOFError:
            break
        if command == "recv":
            assert hccl.HcclRecv(buffer, argument, 7, 0, group, stream) == 0
            status = board.acl.aclrtSynchronizeStream(stream)
            pipe.send((status, board.peek(buffer, argument)))
        elif command == "swap":
            board.poke(buffer, argument)
            size = len(argument)
            items = (SendRecvItem * 2)(
                SendRecvItem(0, buffer, size, 0, 0), SendRecvItem(1, buffer + size, size // 4, 4, 0)
            )
            assert hccl.HcclBatchSendRecv(items, 2, group, stream) == 0
            pipe.send((board.acl.aclrtSynchronizeStream(stream), board.peek(buffer + size, size)))


@contextmanager
def pair(board: Board) -> Iterator[tuple[Any, int, Connection, BaseProcess]]:
    hccl, info = load("hccl"), RootInfo()
    assert hccl.HcclGetRootInfo(ctypes.byref(info)) == 0
    with peer(rank_one, ctypes.string_at(ctypes.byref(info), 4108)) as (process, pipe):
        group = made(hccl.HcclCommInitRootInfo, 2, ctypes.byref(info), 0)
        yield hccl, group, pipe, process
        hccl.HcclCommDestroy(group)


def test_ranks_send_and_receive(board: Board) -> None:
    stream, buffer = board.stream(), board.malloc(MIB)
    data, back = os.urandom(MIB // 2), os.urandom(MIB // 2)
    board.poke(buffer, data)
    with pair(board) as (hccl, group, pipe, _):
        assert hccl.HcclSend(buffer, len(data), 0, 1, group, stream) == 0
        assert board.acl.aclrtSynchronizeStreamWithTimeout(stream, 30) == SYNC_TIMEOUT
        pipe.send(("recv", len(data)))
        assert pipe.recv() == (0, data)
        assert board.acl.aclrtSynchronizeStream(stream) == 0
        pipe.send(("swap", back))
        items = (SendRecvItem * 2)(
            SendRecvItem(1, buffer + len(data), len(back), 7, 1), SendRecvItem(0, buffer, len(data), 7, 1)
        )
        assert hccl.HcclBatchSendRecv(items, 2, group, stream) == 0
        assert pipe.recv() == (0, data)
        assert board.acl.aclrtSynchronizeStream(stream) == 0
        assert board.peek(buffer + len(data), len(back)) == back
        assert hccl.HcclSend(board.malloc_host(8), 8, 0, 1, group, stream) == 1
        assert hccl.HcclSend(buffer, 8, 0, 0, group, stream) == 1
        assert hccl.HcclSend(buffer, 8, 99, 1, group, stream) == 5
        assert hccl.HcclSend(None, 8, 0, 1, group, stream) == 2
        assert in_thread(lambda: hccl.HcclSend(buffer, 8, 0, 1, group, stream)) == 15
        board.faults("HcclSend:1=4")
        assert hccl.HcclSend(buffer, 8, 0, 1, group, stream) == 4


def test_a_partner_that_dies_fails_the_stream_and_the_group(board: Board) -> None:
    stream, buffer, error = board.stream(), board.malloc(64), ctypes.c_int()
    with pair(board) as (hccl, group, _, process):
        assert hccl.HcclRecv(buffer, 64, 0, 1, group, stream) == 0
        assert hccl.HcclGetCommAsyncError(group, ctypes.byref(error)) == error.value == 0
        process.kill()
        assert board.acl.aclrtSynchronizeStream(stream) == INTERNAL
        assert hccl.HcclGetCommAsyncError(group, ctypes.byref(error)) == 0
        assert error.value == 21


def test_a_silent_partner_and_a_destroyed_group(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, buffer, error = board.stream(), board.malloc(64), ctypes.c_int()
    with pair(board) as (hccl, group, pipe, _):
        pipe.send(("recv", 64))
        status, _ = pipe.recv()
        assert status == INTERNAL
        assert hccl.HcclGetCommAsyncError(group, ctypes.byref(error)) == 0
    with pair(board) as (hccl, group, _, _):
        assert hccl.HcclRecv(buffer, 64, 0, 1, group, stream) == 0
        assert board.acl.aclrtSynchronizeStreamWithTimeout(stream, 30) == SYNC_TIMEOUT
        assert hccl.HcclCommDestroy(group) == 0
        assert board.acl.aclrtSynchronizeStream(stream) == INTERNAL
        assert hccl.HcclCommDestroy(group) == 1
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    info, pointer = RootInfo(), ctypes.c_void_p()
    assert hccl.HcclGetRootInfo(ctypes.byref(info)) == 0
    assert hccl.HcclCommInitRootInfo(2, ctypes.byref(info), 0, ctypes.byref(pointer)) == 9
