"""libcann_hixl.so emulated: its order of calls, its limits, and bytes that move between processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from .libraries import (
    Board,
    Engine,
    made,
)
from .processes import free_port, in_thread, peer, stop

MIB = 1 << 20
PARAM, TIMEOUT, NOT_CONNECTED, ALREADY, EXHAUSTED, FAILED = 103900, 103901, 103902, 103903, 203900, 503900


def serve(pipe: Connection, name: str, content: bytes) -> None:
    """An engine with a device and a host region; what arrives on the pipe is what it answers to."""
    board, engine = Board(1), Engine(name)
    assert engine.initialize() == 0
    device, host = board.malloc(len(content)), board.malloc_host(len(content))
    board.poke(device, content)
    board.poke(host, content[::-1])
    assert engine.register(device, len(content))[0] == engine.register(host, len(content), True)[0] == 0
    pipe.send((device, host))
    while True:
        try:
            command, argument = pipe.recv()
        except EOFError:
            break
        if command == "faults":
            board.faults(argument)
            pipe.send(None)
        elif command == "peek":
            pipe.send(board.peek(argument, len(content)))
        elif command == "register":
            late = board.malloc(argument)
            pipe.send((engine.register(late, argument)[0], late))
    engine.delete()


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(MIB + 13)


@contextmanager
def serving(content: bytes) -> Iterator[tuple[BaseProcess, Connection, str, int, int]]:
    name = f"127.0.0.1:{free_port()}"
    with peer(serve, name, content) as (process, pipe):
        device, host = pipe.recv()
        yield process, pipe, name, device, host


@pytest.fixture
def client(board: Board) -> Iterator[Engine]:
    engine = Engine("127.0.0.1")
    assert engine.initialize() == 0
    yield engine
    engine.delete()


def test_order_and_arguments_of_an_engine(board: Board) -> None:
    port = free_port()
    engine, other = Engine(f"127.0.0.1:{port}"), Engine(f"127.0.0.1:{port}")
    device = board.malloc(8192)
    assert engine.register(device, 8192)[0] == engine.connect("127.0.0.1:1") == FAILED
    assert in_thread(engine.initialize) == FAILED
    assert engine.initialize() == 0
    assert other.initialize() == PARAM
    assert Engine("nowhere").initialize() == PARAM
    assert engine.register(id(engine), 8)[0] == PARAM
    assert engine.register(device, 8193)[0] == PARAM
    assert engine.register(device, 8192, True)[0] == PARAM
    status, handle = engine.register(device, 4096)
    assert status == 0
    assert engine.register(device + 4095, 8)[0] == PARAM
    assert in_thread(lambda: engine.deregister(handle)) == FAILED
    assert engine.deregister(handle) == 0
    assert engine.deregister(handle) == PARAM
    assert engine.connect(f"127.0.0.1:{free_port()}", 100) == TIMEOUT
    assert engine.disconnect("127.0.0.1:1") == NOT_CONNECTED
    assert engine.transfer("127.0.0.1:1", False, (device, device, 8)) == NOT_CONNECTED
    engine.finalize()
    assert engine.register(device, 8)[0] == FAILED
    assert other.initialize() == 0
    engine.delete()
    other.delete()


def test_an_engine_has_its_limits(board: Board, client: Engine) -> None:
    device = board.malloc(8192)
    assert [client.register(device + 16 * i, 16)[0] for i in range(257)] == [0] * 256 + [EXHAUSTED]
    client.finalize()
    assert client.initialize() == 0
    huge = 1 << 45
    assert board.acl.emu_adopt(huge, 51 << 30) == 0
    assert client.register(huge, 50 << 30)[0] == 0
    assert client.register(huge + (50 << 30), 1)[0] == EXHAUSTED
    assert board.acl.emu_disown(huge) == 0


def test_bytes_move_between_processes_both_ways(board: Board, client: Engine, content: bytes) -> None:
    size = len(content)
    mine = board.malloc(2 * size)
    assert client.register(mine, 2 * size)[0] == 0
    with serving(content) as (_, pipe, name, device, host):
        assert client.connect(name) == 0
        assert client.connect(name) == ALREADY
        assert client.transfer(name, False, (mine, device, size), (mine + size, host, size)) == 0
        assert board.peek(mine, 2 * size) == content + content[::-1]
        assert client.transfer(name, True, (mine, host, size)) == 0
        pipe.send(("peek", host))
        assert pipe.recv() == content
        request = client.start(name, False, (mine + size, device, size))
        while client.status(request) == (0, 0):
            time.sleep(0.001)
        assert client.status(request)[0] == PARAM
        assert board.peek(mine + size, size) == content
        threads = [
            threading.Thread(target=lambda at: results.append(one(at)), args=(at,)) for at in range(0, 64 * 1024, 16384)
        ]
        results: list[int] = []
        context = made(board.acl.aclrtGetCurrentContext)

        def one(at: int) -> int:
            board.acl.aclrtSetCurrentContext(context)
            return client.transfer(name, False, (mine + at, host + at, 16384))

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [0] * 4
        assert board.peek(mine, 65536) == content[:65536]
        assert client.transfer(name, False, (mine, device, size + 1)) == PARAM
        assert client.transfer(name, False, (mine + size + 1, device, size)) == PARAM
        pipe.send(("register", 4096))
        status, late = pipe.recv()
        assert status == 0
        assert client.transfer(name, False, (mine, late, 4096)) == PARAM
        assert client.disconnect(name) == client.connect(name) == 0
        assert client.transfer(name, False, (mine, late, 4096)) == 0


def test_a_late_answer_is_written_until_the_link_is_taken_down(board: Board, client: Engine, content: bytes) -> None:
    mine = board.malloc(4096)
    assert client.register(mine, 4096)[0] == 0
    with serving(content) as (_, pipe, name, device, host):
        pipe.send(("faults", "HixlServe:1=~150;HixlServe:3=~150;HixlServe:5=503900"))
        pipe.recv()
        assert client.connect(name) == 0
        assert client.transfer(name, False, (mine, device, 4096), timeout_ms=30) == TIMEOUT
        assert client.transfer(name, False, (mine, device, 4096)) == FAILED
        assert client.connect(name) == ALREADY
        assert board.peek(mine, 4096) == bytes(4096)
        time.sleep(0.25)
        assert board.peek(mine, 4096) == content[:4096]
        assert client.disconnect(name) == client.connect(name) == 0
        assert client.transfer(name, False, (mine, host, 4096)) == 0
        before = board.peek(mine, 4096)
        assert client.transfer(name, False, (mine, device, 4096), timeout_ms=30) == TIMEOUT
        assert client.disconnect(name, 20) == 0
        time.sleep(0.2)
        assert board.peek(mine, 4096) == before
        assert client.connect(name) == client.transfer(name, False, (mine, device, 4096)) == 0
        assert client.transfer(name, False, (mine, device, 4096)) == FAILED


def test_a_remote_that_stops_or_dies(board: Board, client: Engine, content: bytes) -> None:
    mine = board.malloc(4096)
    assert client.register(mine, 4096)[0] == 0
    with serving(content) as (process, pipe, name, device, host):
        assert client.connect(name) == 0
        stop(process)
        board.poke(mine, b"z" * 4096)
        assert client.transfer(name, True, (mine, host, 4096), timeout_ms=50) == TIMEOUT
        assert client.disconnect(name, 50) == 0
        assert client.connect(name, 50) == TIMEOUT
        os.kill(process.pid or 0, signal.SIGCONT)
        assert client.connect(name) == 0
        pipe.send(("peek", host))
        assert pipe.recv() == content[::-1]
        process.kill()
        process.join()
        assert client.transfer(name, False, (mine, device, 4096)) in (FAILED, TIMEOUT)
        assert client.disconnect(name) == 0
