"""Agents hand KV over by RDMA: from another process, and from another guest where there is one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from pd_connector import Agent, Config, PeerLost, Ticket, TransferFailed

from .other import ADDRESS, Far, told
from .prefill import BLOCKS, PROMPT, forward, kv_cache
from .rxe import hardware

HERE = "10.77.0.2" if ADDRESS else "127.0.0.1"
MODULE = "tests.rdma_vm.inside.prefill"
TARGET = list(range(BLOCKS - len(PROMPT), BLOCKS))[::-1]


def prefill(spoil: str = "") -> Any:
    """A process of P's: in the other guest, or here."""
    config = Config(transport=["verbs"], host=ADDRESS or "127.0.0.1", insecure=bool(ADDRESS))
    words = (msgspec.json.encode(config).decode(), spoil)
    if ADDRESS:
        return Far(MODULE, *words)
    return subprocess.Popen([sys.executable, "-m", MODULE, *words], stdout=subprocess.PIPE)


def decode_config(**more: Any) -> Config:
    return Config(transport=["verbs"], host=HERE, insecure=bool(ADDRESS), **more)


def wrong_layers(cache: list[Any]) -> list[int]:
    return [layer for layer, kv in enumerate(cache) if not np.array_equal(kv[TARGET], forward(layer))]


@pytest.mark.parametrize("options", [{}, {"wire_verb": "write"}], ids=["read", "write"])
async def test_blocks_of_a_prompt(options: dict[str, Any]) -> None:
    process = prefill()
    cache = kv_cache()
    before = hardware()
    async with Agent(decode_config(audit=True, transport_options={"verbs": options})) as agent:
        agent.register(cache)
        ticket = Ticket.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
        stats = await agent.pull(ticket, TARGET)
        assert stats.transport == "verbs"
        assert stats.bytes == sum(kv[PROMPT].nbytes for kv in cache)
        moved = hardware()["rcvd_pkts"] - before["rcvd_pkts"]
        assert moved >= stats.bytes // 4096
    assert wrong_layers(cache) == []
    assert process.stdout.readline().strip() == b"every reader has its blocks"
    process.wait(20)


async def test_a_control_that_fails() -> None:
    """One bit of P's memory changes after its forward: the bytes that arrive are not those of the model."""
    process = prefill("spoil")
    cache = kv_cache()
    async with Agent(decode_config()) as agent:
        agent.register(cache)
        ticket = Ticket.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
        await agent.pull(ticket, TARGET)
    assert wrong_layers(cache) == [2]
    process.wait(20)


async def test_prefill_is_killed_before_it_is_read() -> None:
    process = prefill()
    ticket = Ticket.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
    process.kill()
    process.wait(20)
    async with Agent(decode_config()) as agent:
        agent.register(kv_cache())
        with pytest.raises((PeerLost, TransferFailed)):
            await agent.pull(ticket, TARGET, timeout=20)


@pytest.mark.skipif(not ADDRESS, reason="needs a second guest")
async def test_the_other_host_vanishes_while_it_is_read() -> None:
    """Its link is down: no connection ends, nobody says anything."""
    process = prefill()
    cache = kv_cache()
    async with Agent(decode_config()) as agent:
        agent.register(cache)
        ticket = Ticket.from_bytes(bytes.fromhex(process.stdout.readline().decode()))
        await agent.pull(ticket, TARGET)
        assert wrong_layers(cache) == []
    process.wait(20)
    again = prefill()
    ticket = Ticket.from_bytes(bytes.fromhex(again.stdout.readline().decode()))
    async with Agent(decode_config()) as agent:
        agent.register(kv_cache())
        told("down", 6)
        await asyncio.sleep(1)
        with pytest.raises((PeerLost, TransferFailed)):
            await agent.pull(ticket, TARGET, timeout=30)
    again.kill()
    again.wait(60)
