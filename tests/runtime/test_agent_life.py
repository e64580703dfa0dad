"""Agents that are not started yet, being closed, or closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pd_connector import Agent, LocalProtocolError
from pd_connector.memory import Region

from .test_agent import QUICK, cache, pair, zmq_only


async def test_close_does_not_wait_for_memory_to_be_faulted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    started, looks = threading.Event(), []

    def populate(region: Region, going: Callable[[], bool]) -> None:
        started.set()
        while going():
            looks.append(region)
            time.sleep(0.01)

    monkeypatch.setattr(Region, "populate", populate)
    async with asyncio.timeout(10):
        async with pair() as (p, source, d, destination):
            await asyncio.to_thread(started.wait, 5)
            await d.pull(p.lease([3]), [4])
            assert (destination[:, 4] == source[:, 3]).all()
    assert looks


async def test_an_agent_that_is_not_running_says_so() -> None:
    agent = Agent(zmq_only(), name="X", limits=QUICK)
    for early in (lambda: agent.register(list(cache())), lambda: agent.lease([1])):
        with pytest.raises(LocalProtocolError, match="was not started"):
            early()
    agent.start()
    with pytest.raises(LocalProtocolError, match="started before"):
        agent.start()
    for nothing in ([], None):
        with pytest.raises(LocalProtocolError, match="no memory"):
            agent.register(nothing)
    for wrong in ({"tokens": -5}, {"tokens": 2**40}, {"key": bytes(1000)}, {"seconds": float("nan")}, {"seconds": 0}):
        with pytest.raises(LocalProtocolError):
            agent.lease([1], **wrong)  # type: ignore[arg-type]
    await agent.close()
    for late in (lambda: agent.register(list(cache())), lambda: agent.lease([1]), agent.start):
        with pytest.raises(LocalProtocolError):
            late()
