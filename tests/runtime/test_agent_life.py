"""Agents that are not started yet, being closed, or closed."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from pd_connector import Agent, Config, ConfigError, LocalProtocolError
from pd_connector.config import parse
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


async def test_an_agent_that_cannot_start_leaves_nothing() -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    config = Config(public_key=public, secret_key=secret, allowed_keys=(public,))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = msgspec.structs.replace(config, port=taken.getsockname()[1])
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            agent = Agent(config, name="X", limits=QUICK)
            with pytest.raises(ConfigError, match="in use"):
                agent.start()
            await agent.close()
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allowed_keys": ["a" * 40]}, "would admit everybody"),
        ({"public_key": PUBLIC, "secret_key": SECRET, "allowed_keys": [""]}, "40 Z85"),
        ({"public_key": PUBLIC, "secret_key": SECRET, "allowed_keys": ["~" * 40]}, "40 Z85"),
        ({"public_key": "~" * 40, "secret_key": SECRET, "allowed_keys": [PUBLIC]}, "40 Z85"),
        ({"public_key": "a" * 40, "secret_key": SECRET, "allowed_keys": [PUBLIC]}, "does not belong"),
        ({"public_key": PUBLIC, "allowed_keys": [PUBLIC]}, "go together"),
        *(({"advertise": host}, "advertise") for host in ("a b", "a/b", "a#b", "ä", "a\0b", "1.2.3.4;5", "a" * 300)),
        ({"io_cpus": [2**31]}, "io_cpus"),
        ({"io_cpus": [-1]}, "io_cpus"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(settings)


def test_options_that_are_no_table_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'staged-tcp'.* is a table of names and values, not 5"):
        Config(transport_options={"staged-tcp": 5})  # type: ignore[dict-item]


async def test_read_only_memory_is_leased_and_never_pulled_into(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.write_bytes(bytes(range(256)) * 64)
    frozen = np.memmap(file, np.uint8, mode="r", shape=(4, 4096))
    target = np.zeros((4, 4096), np.uint8)
    async with Agent(zmq_only(), name="P") as p, Agent(zmq_only(), name="D") as d:
        p.register([frozen])
        d.register([target])
        await d.pull(p.lease([1]), [2])
        assert (target[2] == frozen[1]).all()
        with pytest.raises(LocalProtocolError, match="read-only"):
            await p.pull(d.lease([1]), [2])


async def test_arguments_of_the_wrong_kind_are_refused_and_leave_nothing() -> None:
    async with pair() as (p, _, d, _):
        ticket = p.lease([1])
        for wrong in ({"timeout": float("nan")}, {"timeout": 0}, {"timeout": "x"}, {"skip_blocks": 0.5}):
            with pytest.raises(LocalProtocolError):
                await d.pull(ticket, [1], **wrong)
        for options in ({"readers": "a"}, {"readers": 1.5}, {"tokens": 1.5}, {"key": "x"}, {"seconds": "1"}):
            with pytest.raises(LocalProtocolError):
                p.lease([2], **options)  # type: ignore[arg-type]
        with pytest.raises(LocalProtocolError):
            p.lease(None)  # type: ignore[arg-type]
        assert not d.core.reader.transfers
        assert not d.core.reader.meetings
        assert len(p._lease_ends) == 1
