"""The portal: an agent on a loop in a thread, driven by synchronous code."""

from __future__ import annotations

import asyncio
import os
import threading

import numpy as np
import pytest

from pd_connector import Agent, Config, LocalProtocolError, Portal


def test_a_synchronous_engine_pulls() -> None:
    source, destination = np.full((2, 4, 256), 9, np.uint8), np.zeros((2, 4, 256), np.uint8)
    portal = Portal("test")
    try:
        agents = [Agent(Config(transport="zmq"), name=name) for name in "PD"]
        for agent, cache in zip(agents, (source, destination), strict=True):
            portal.call(agent.start)
            portal.call(agent.register, list(cache))
        ticket = portal.call(agents[0].lease, [1, 2])
        stats = portal.run(agents[1].pull(ticket, [0, 3]), timeout=10)
        assert stats.bytes == 2 * 2 * 256
        assert (destination[:, [0, 3]] == 9).all()
        for agent in agents:
            portal.run(agent.close(), timeout=10)
    finally:
        portal.close()


def test_errors_come_back_and_waits_end() -> None:
    portal = Portal("test")
    try:
        with pytest.raises(ZeroDivisionError):
            portal.call(lambda: 1 // 0)
        with pytest.raises(TimeoutError):
            portal.run(asyncio.sleep(60), timeout=0.1)
        with pytest.raises(LocalProtocolError, match="cannot wait for itself"):
            portal.call(lambda: portal.call(int))
        order: list[int] = []
        for number in range(100):
            portal.post(order.append, number)
        portal.call(int)
        assert order == list(range(100))
    finally:
        portal.close()
    portal.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        portal.post(int)


def test_its_thread_leaves_the_engines_core() -> None:
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def engine() -> None:
        os.sched_setaffinity(0, {min(before)})
        portal = Portal("test")
        seen.append(portal.call(lambda: os.sched_getaffinity(0)))
        portal.close()

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join(20)
    assert seen == [before]


def test_a_child_of_a_fork_is_told() -> None:
    portal = Portal("test")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            portal.post(int)
            os.write(writing, b"no error")
        except LocalProtocolError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    assert b"before a fork" in os.read(reading, 1000)
    os.waitpid(child, 0)
    os.close(reading)
    portal.close()
