"""Pools: memory of our own that readers map; the suite with the owner's blocks in one."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import Pool, pool_at
from pd_connector.memory import native as extension
from pd_connector.testing.arena import GEOMETRIES, POOLED, Arena
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.pair import SEED
from pd_connector.transport.base import Transport
from pd_connector.transport.native import ShmTransport

needs_native = pytest.mark.skipif(extension() is None, reason="the C extension was not built")


@needs_native
@pytest.mark.slow
class TestShmFromAPool(TransportConformance):
    memory = POOLED

    def make(self, agent: str) -> Transport:
        return ShmTransport(agent, {})


@needs_native
class TestShmFromAPoolBetweenProcesses(ProcessConformance):
    owner_spec = ("shm", {})
    memory = POOLED

    def make(self, agent: str) -> Transport:
        return ShmTransport(agent, {})


def test_an_arena_in_pools_lies_in_pools() -> None:
    arena = Arena(GEOMETRIES["mixed"], SEED, POOLED)
    assert arena.same(Arena(GEOMETRIES["mixed"], SEED).arrays)
    assert all(pool_at(region.address, region.length) for region in arena.regions)
    plain = Arena(GEOMETRIES["mixed"], SEED)
    assert not any(pool_at(region.address, region.length) for region in plain.regions)


def test_a_pool_lives_as_long_as_what_is_made_of_it() -> None:
    pool = Pool(1000)
    assert len(pool) == os.sysconf("SC_PAGESIZE")
    fd, array, alive = pool.fd, np.frombuffer(pool, np.uint8), weakref.ref(pool)
    assert array.ctypes.data == pool.address
    del pool
    gc.collect()
    assert pool_at(array.ctypes.data, array.nbytes) is alive()
    assert pool_at(array.ctypes.data, array.nbytes + 1) is None
    del array
    gc.collect()
    assert alive() is None
    with pytest.raises(OSError):
        os.fstat(fd)


def test_nobody_else_can_write_to_a_pool_or_shrink_it() -> None:
    pool = Pool(1 << 16)
    again = os.open(f"/proc/self/fd/{pool.fd}", os.O_RDWR)
    try:
        for attempt in (lambda: os.truncate(again, 0), lambda: os.write(again, b"x")):
            with pytest.raises(PermissionError):
                attempt()
    finally:
        os.close(again)


@pytest.mark.parametrize("length", [0, -1, 2**62, 2**80])
def test_a_pool_that_cannot_be_had(length: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(LocalProtocolError, match="pool of"):
        Pool(length)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
