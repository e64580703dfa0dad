"""A peer of `pdc doctor` that speaks the protocol, and lies in it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from pd_connector.layout import KVLayout
from pd_connector.protocol.messages import Endpoint, Hello, Welcome, decode, encode

FORGED = "\x1b[2J\x1b]0;title\x07\r\nC extension  ok  forged row"


@contextlib.contextmanager
def speaker(**lies: Any) -> Iterator[str]:
    """Answers every HELLO with a Welcome that has ``lies``; gives its address."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if not router.poll(50):
                continue
            *route, frame = router.recv_multipart()
            hello = decode(frame)
            if isinstance(hello, Hello):
                said: dict[str, Any] = {"agent": "x", "model": "", "layout": None, "transports": {}} | lies
                router.send_multipart([*route, encode(Welcome(src=77, dst=hello.src, version=1, **said))])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        stop.set()
        thread.join()
        router.close(0)
        context.term()


def doctor(address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pd_connector.cli", "doctor", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def test_addresses_of_ranks_that_are_none() -> None:
    bad = ("not an address", "tcp://[::1", "ipc:///x", "tcp://127.0.0.1:99999")
    with speaker(
        directory=tuple(Endpoint(rank, address, 1, KVLayout(groups=())) for rank, address in enumerate(bad))
    ) as address:
        done = doctor(address)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("is not an agent's address") == len(bad)
    assert "Traceback" not in done.stderr


def test_a_directory_without_end() -> None:
    nothing = KVLayout(groups=())
    with speaker(directory=tuple(Endpoint(n, "tcp://127.0.0.1:9", n, nothing) for n in range(4096))) as address:
        done = doctor(address)
    assert done.returncode == 1
    assert "4032 more are named and were not greeted" in done.stdout


@pytest.mark.parametrize("field", ["agent", "model", "refused"])
def test_words_that_would_move_the_cursor(field: str) -> None:
    with speaker(**{field: FORGED}) as address:
        done = doctor(address)
    assert "forged row" in done.stdout
    assert not any(letter in done.stdout for letter in "\x1b\x07\r")
    assert not any(line.startswith("C extension") for line in done.stdout.splitlines())
