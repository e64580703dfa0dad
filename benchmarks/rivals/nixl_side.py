"""NIXL's side of the benchmark, run by its own environment: `nixl_side.py owner|reader`.

Both variants read by lists of descriptors prepared once, from which a request picks by index, as vLLM's connector
does, and poll the state of the transfer without sleeping. `tuned` differs from `default` in what TUNED says, and in
that it has no progress thread: the two sides' own polling makes progress.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
import time
from collections.abc import Callable
from fcntl import ioctl
from typing import Any

import work

SIOCGIFADDR = 0x8915
# Tried on two cores: UCX answers a read over TCP in pieces of a segment, 8 KiB by default. Segments of 64 KiB made it
# about 1.3 times as fast with chunks of 8 KiB and 3 times with 64 KiB; 16 KiB to 1 MiB, larger socket buffers and more
# segments were no faster. On the same host naming the transports changed nothing (it finds cma by itself), and two NIXL
# threads took twice the CPU time for a tenth more at 8 KiB and less at 64 KiB.
TUNED: dict[str, dict[str, str]] = {
    "host": {},
    "veth": {"UCX_TCP_TX_SEG_SIZE": "64k", "UCX_TCP_RX_SEG_SIZE": "64k"},
}
# Between namespaces of one host UCX would find shared memory, which two hosts do not have.
REACH: dict[str, dict[str, str]] = {"host": {}, "veth": {"UCX_TLS": "tcp"}}
# The owner of a same-host read only has connections to answer: spinning there would only cost it CPU time.
OWNER_PAUSE_S = {"host": 0.001, "veth": 0.0}


def device_of(address: str) -> str:
    """The network device that carries an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                found = ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # a device without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    raise OSError(f"no device carries {address}")


def environment(setup: work.Setup) -> dict[str, str]:
    """What UCX is to find in the environment."""
    chosen = REACH[setup.scope] | (TUNED[setup.scope] if setup.tuned else {})
    return chosen | ({"UCX_NET_DEVICES": device_of(setup.address)} if setup.scope == "veth" else {})


def make_agent(name: str, setup: work.Setup, memory: work.Bytes) -> Any:
    """An agent that knows the memory."""
    os.environ.update(environment(setup))
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=not setup.tuned))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent


def owner(line: work.Line, setup: work.Setup) -> None:
    memory = work.allocate(setup)
    work.fill(memory)
    agent = make_agent("owner", setup, memory)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    line.send({"pid": os.getpid(), "base": memory.ctypes.data, "agent": metadata, "settings": environment(setup)})
    pause = OWNER_PAUSE_S[setup.scope]

    def progress() -> None:
        agent.get_new_notifs()
        if pause:
            time.sleep(pause)

    work.touch_all(line, memory, progress if setup.tuned else None)


def chunks_at(base: int, setup: work.Setup) -> list[tuple[int, int, int]]:
    return [(base + number * setup.chunk, setup.chunk, 0) for number in range(setup.chunks)]


def reader(line: work.Line, setup: work.Setup) -> None:
    memory = work.allocate(setup)
    agent = make_agent("reader", setup, memory)
    peer = agent.add_remote_agent(base64.b64decode(setup.peer["agent"]))
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", chunks_at(memory.ctypes.data, setup), "DRAM")
    remote = agent.prep_xfer_dlist(peer, chunks_at(setup.peer["base"], setup), "DRAM")
    finished: list[Any] = []

    def prepare(request: work.Request) -> Callable[[], None]:
        while finished:
            agent.release_xfer_handle(finished.pop())
        handle = agent.make_prepped_xfer("READ", local, request.target.tolist(), remote, request.source.tolist())
        finished.append(handle)

        def read() -> None:
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"the transfer ended {state}")

        return read

    line.send({"pid": os.getpid()})
    work.read_all(line, setup, memory, prepare)


if __name__ == "__main__":
    work.run(owner, reader)
