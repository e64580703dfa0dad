"""A data connection that breaks while nobody reads costs nothing: the next read opens another one."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

import msgspec
import numpy as np

from pd_connector.memory import order_grids
from pd_connector.plan import CopyPlan, coalesce, whole_patterns
from pd_connector.tensors import to_regions
from pd_connector.transport.base import Completion, LeaseId, Status
from pd_connector.transport.zmq import ZmqTransport
from pd_connector.transport.zmq_wire import decode_where, encode

LEASE, CAPABILITY = LeaseId(1, 1), bytes(range(16))


class Cable:
    """A TCP relay in front of an owner; ``cut`` breaks every connection through it."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                pair = (near, socket.create_connection(self._target, 5))
                self._pairs.append(pair)
                threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                for ready in select.select([near, far], [], [], 5)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    (far if ready is near else near).sendall(data)

    def cut(self) -> None:
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept, which close alone would not
        self._listener.close()
        self.cut()


def wait(transport: ZmqTransport, tag: int) -> Completion:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        select.select([transport.fileno()], [], [], 0.2)
        for completion in transport.poll(16):
            if completion.tag == tag:
                return completion
    raise AssertionError(f"tag {tag} did not complete")


def test_the_next_read_opens_another_connection() -> None:
    source = np.random.default_rng(3).integers(1, 255, (2, 8, 4096), np.uint8)
    target = np.zeros_like(source)
    owner, reader = ZmqTransport("P", {}), ZmqTransport("D", {})
    where = decode_where(owner.describe())
    host, _, port = where.endpoint.removeprefix("tcp://").rpartition(":")
    cable = Cable((host, int(port)))
    try:
        regions = to_regions(list(target))
        owner.register(to_regions(list(source)))
        reader.register(regions)
        owner.grant(LEASE, CAPABILITY, {0: np.arange(8, dtype=np.uint32)})
        through = msgspec.structs.replace(where, endpoint=f"tcp://127.0.0.1:{cable.port}")
        reader.connect("P", encode(through), 1)
        assert wait(reader, 1).status is Status.DONE
        for tag in (2, 3):
            plan = CopyPlan(coalesce([tag], [tag]), whole_patterns(order_grids(regions), 0))
            reader.post_read("P", LEASE, CAPABILITY, plan, tag)
            assert wait(reader, tag) == Completion(tag, Status.DONE)
            assert (target[:, tag] == source[:, tag]).all()
            cable.cut()
            time.sleep(0.3)
        cable.close()
        reader.post_read("P", LEASE, CAPABILITY, plan, 4)
        assert wait(reader, 4).status is Status.PEER_LOST
    finally:
        cable.close()
        reader.close()
        owner.close()
