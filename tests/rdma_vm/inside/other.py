"""The other guest: run as a module there, it serves what tests here ask for. One connection for each thing asked, a
JSON line first; whoever is started has the connection for its standard input and output."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

import msgspec

from pd_connector.testing import owner_process
from pd_connector.testing.arena import PRIVATE
from pd_connector.testing.owner_process import ProcessOwner

PORT = 7000
ADDRESS = os.environ.get("PDC_RDMA_OTHER", "")
"""Where the other guest is; empty where there is none."""
_CONNECT_S = 240.0


def ask(*command: Any) -> socket.socket:
    """Waits for the other guest to come up."""
    end = time.monotonic() + _CONNECT_S
    while True:
        try:
            made = socket.create_connection((ADDRESS, PORT), timeout=5)
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    made.settimeout(None)
    made.sendall(json.dumps(command).encode() + b"\n")
    return made


def told(*command: Any) -> str:
    with ask(*command) as made:
        return made.makefile().readline()


class Far:
    """A process of the other guest, as far as subprocess.Popen's users need one."""

    def __init__(self, module: str, *words: str) -> None:
        self._socket = ask("start", module, *words)
        self.stdin: BinaryIO = self._socket.makefile("wb")
        self.stdout: BinaryIO = self._socket.makefile("rb", buffering=0)  # type: ignore[assignment]
        self.pid = int(self.stdout.readline())

    def poll(self) -> int | None:
        return None if told("alive", self.pid).strip() == "True" else 0

    def send_signal(self, number: int) -> None:
        told("signal", self.pid, int(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        self._socket.close()


class FarOwner(ProcessOwner):
    """An owner of a conformance test in the other guest."""

    def __init__(self, name: str, options: Mapping[str, Any], geometry: str, seed: int) -> None:
        words = msgspec.json.encode([name, options, geometry, seed, PRIVATE]).decode()
        self._process = Far(owner_process.__name__, words)  # type: ignore[assignment]
        self._unread = b""
        self._description = bytes.fromhex(self._answer())


# --- in the other guest


def _start(connection: socket.socket, module: str, *words: str) -> None:
    process = subprocess.Popen([sys.executable, "-m", module, *words], stdin=subprocess.PIPE, stdout=connection)
    connection.sendall(b"%d\n" % process.pid)
    _children[process.pid] = process
    assert process.stdin is not None
    try:
        while more := connection.recv(65536):
            process.stdin.write(more)
            process.stdin.flush()
    except OSError:
        pass  # it was killed, or the other side is gone


def _down(seconds: float) -> None:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    time.sleep(seconds)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)


_children: dict[int, subprocess.Popen[bytes]] = {}


def _serve(connection: socket.socket) -> None:
    with connection:
        line = b""
        while not line.endswith(b"\n"):
            line += connection.recv(1) or b"\n"
        command, *words = json.loads(line)
        if command == "start":
            _start(connection, *words)
        elif command == "alive":
            connection.sendall(f"{_children[words[0]].poll() is None}\n".encode())
        elif command == "signal":
            _children[words[0]].send_signal(words[1])
            connection.sendall(b"sent\n")
        elif command == "down":
            connection.sendall(b"soon\n")
            threading.Timer(0.3, _down, words).start()
        elif command == "quit":
            os._exit(0)


def main() -> None:
    listener = socket.create_server(("0.0.0.0", PORT))
    while True:
        threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main()
