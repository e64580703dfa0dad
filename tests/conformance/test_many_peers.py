"""One reader, more peers than libzmq has sockets for by default."""

from __future__ import annotations

import resource
import select
import time

import pytest

from pd_connector.memory import native
from pd_connector.transport import registry
from pd_connector.transport.base import Status

PEERS = 400
DESCRIPTORS = 8 * PEERS


@pytest.mark.parametrize("name", ["zmq", *(["tcp"] if native() else [])])
def test_hundreds_of_peers_at_once(name: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        pytest.skip(f"not more than {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    owner, reader = (registry.load(name)(agent, {}) for agent in ("owner", "reader"))
    try:
        for number in range(PEERS):
            reader.connect(f"peer {number}", owner.describe(), number + 1)
        ends = {}
        deadline = time.monotonic() + 30
        while len(ends) < PEERS and time.monotonic() < deadline:
            select.select([reader.fileno()], [], [], 1)
            ends |= {end.tag: end for end in reader.poll(64)}
        assert len(ends) == PEERS
        assert {end.status for end in ends.values()} == {Status.DONE}, list(ends.values())[-1]
    finally:
        reader.close()
        owner.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
