"""What a guest can do with its device, and what its counters say."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport.verbs import VerbsTransport

SECOND = "10.78.0.1"


def hardware(device: str = "rxe0") -> dict[str, int]:
    folder = Path("/sys/class/infiniband", device, "ports/1/hw_counters")
    return {path.name: int(path.read_text()) for path in folder.iterdir() if path.name != "lifespan"}


def sh(*words: str) -> None:
    subprocess.run(words, check=True, timeout=30)


@contextmanager
def second_rail() -> Iterator[None]:
    """rxe1 on an interface of its own: it reaches itself, as rxe0 does."""
    sh("ip", "link", "add", "d0", "type", "dummy")
    try:
        sh("ip", "addr", "add", f"{SECOND}/24", "dev", "d0")
        sh("ip", "link", "set", "d0", "mtu", "9000", "up")
        sh("rdma", "link", "add", "rxe1", "type", "rxe", "netdev", "d0")
        wait_for_port("rxe1")
        yield
    finally:
        sh("ip", "link", "del", "d0")


def wait_for_port(device: str, state: str = "ACTIVE") -> None:
    end = time.monotonic() + 20
    while not Path("/sys/class/infiniband", device, "ports/1/state").read_text().strip().endswith(state):
        assert time.monotonic() < end, f"{device} does not become {state}"
        time.sleep(0.1)


@contextmanager
def pair(geometry: str = "big", owner: dict[str, object] | None = None, **options: object) -> Iterator[Pair]:
    """A reader with these options, connected to an owner in this process."""
    served = LocalOwner(VerbsTransport("owner", owner or {}), geometry, SEED)
    reader = VerbsTransport("reader", options)
    try:
        yield Pair(reader, served, geometry)
    finally:
        reader.close()
        served.close()
