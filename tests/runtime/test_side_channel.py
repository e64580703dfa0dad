"""The side channel under attack and under keys, on real sockets."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.asyncio

from pd_connector import Agent, Config, PeerLost, TransferFailed
from pd_connector.protocol.context import Limits
from pd_connector.protocol.messages import (
    MAX_FRAME,
    VERSION,
    Commit,
    Hello,
    Open,
    Release,
    Renew,
    Welcome,
    decode,
    encode,
)

FRAMES = 100_000
GROWTH = 10 * 2**20
QUICK = Limits(hello=20.0, retry=0.1)


def resident() -> int:
    """Bytes of this process's memory that lie in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def templates(agent: Agent) -> list[bytes]:
    """One good frame of each kind that an owner answers, for mutation and replay."""
    lease = {"lease": 1, "epoch": 1, "capability": bytes(16)}
    common = {"src": 99, "dst": agent.incarnation}
    return [
        encode(hello()),
        encode(Open(**common, **lease, transfer=1, reader="r", transport="zmq")),
        encode(Commit(**common, **lease, transfer=1, part=0, reader="r", final=True)),
        encode(Renew(**common, **lease)),
        encode(Release(**common, **lease, reader="r")),
        encode(Release(src=99, dst=12345, lease=1, epoch=1, capability=bytes(16))),
    ]


def hello() -> Hello:
    return Hello(src=99, dst=0, version=VERSION, agent="attacker", model="", layout=None, transports={})


def hostile(chance: random.Random, good: list[bytes]) -> list[bytes]:
    """One message: malformed, truncated, mutated, replayed, oversized or random; sometimes of a wrong part count."""
    frame = bytearray(chance.choice(good))
    kind = chance.randrange(7)
    if kind == 0:
        return [chance.randbytes(chance.randrange(200))]
    if kind == 1:
        return [bytes(frame[: chance.randrange(len(frame))])]
    if kind == 2:
        for _ in range(chance.randrange(1, 6)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        return [bytes(frame)]
    if kind == 3:
        return [bytes(frame), chance.randbytes(10), b""]
    if kind == 4:
        return [b"\xdd" + (2**31).to_bytes(4, "big") + b"\x93" * 50]  # a huge array, deeply nested
    if kind == 5:
        return [b""]
    return [bytes(frame)]


async def test_a_hundred_thousand_hostile_frames(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="pd_connector")
    cache = np.zeros((2, 8, 1024), np.uint8)
    async with Agent(Config(transport="zmq"), name="P", limits=QUICK) as p:
        p.register(list(cache))
        p.lease([1])
        good, chance = templates(p), random.Random(7)
        context = zmq.asyncio.Context()
        attacker = context.socket(zmq.DEALER)
        attacker.setsockopt(zmq.RCVHWM, 100)
        attacker.connect(p.address)
        start, logged = 0, len(caplog.records)
        for number in range(FRAMES):
            await attacker.send_multipart(hostile(chance, good))
            if number % 100 == 0:
                await asyncio.sleep(0)
            if number == FRAMES // 10:
                start = resident()  # caches of the allocator and of libzmq have their size by now
        oversized = context.socket(zmq.DEALER)
        oversized.connect(p.address)
        await oversized.send(bytes(MAX_FRAME + 1))
        answer = await asyncio.wait_for(ask(context, p), 30)
        assert answer.src == p.incarnation
        assert not answer.refused
        assert resident() - start < GROWTH
        assert len(caplog.records) - logged < 100
        counted = p.counters()
        assert counted["malformed_frames"] > FRAMES // 10
        assert counted["frames_malformed"] > FRAMES // 100
        context.destroy(linger=0)


async def ask(context: zmq.asyncio.Context, agent: Agent) -> Welcome:
    """A good HELLO on a new connection."""
    socket = context.socket(zmq.DEALER)
    socket.connect(agent.address)
    await socket.send(encode(hello()))
    message = decode(await socket.recv())
    assert isinstance(message, Welcome)
    return message


def keys() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def with_keys(own: tuple[str, str], *allowed: str) -> Config:
    return Config(transport="zmq", public_key=own[0], secret_key=own[1], allowed_keys=allowed)


async def pull_between(p_config: Config, d_config: Config) -> None:
    source, destination = np.full((1, 4, 512), 5, np.uint8), np.zeros((1, 4, 512), np.uint8)
    async with Agent(p_config, name="P", limits=QUICK) as p, Agent(d_config, name="D", limits=QUICK) as d:
        p.register(list(source))
        d.register(list(destination))
        await asyncio.wait_for(d.pull(p.lease([1]), [2], timeout=20), 30)
        assert (destination[0, 2] == 5).all()


async def test_peers_that_know_each_other_exchange_blocks() -> None:
    p, d = keys(), keys()
    await pull_between(with_keys(p, d[0]), with_keys(d, p[0]))


async def test_an_owner_lets_only_listed_keys_in() -> None:
    p, d, other = keys(), keys(), keys()
    with pytest.raises(TransferFailed) as caught:
        await pull_between(with_keys(p, other[0]), with_keys(d, p[0]))
    assert isinstance(caught.value.__cause__, PeerLost)


async def test_a_reader_dials_only_listed_keys() -> None:
    p, d, other = keys(), keys(), keys()
    with pytest.raises(TransferFailed, match="not in allowed_keys"):
        await pull_between(with_keys(p, d[0]), with_keys(d, other[0]))


@pytest.mark.parametrize("secured", ["P", "D"])
async def test_both_sides_or_none(secured: str) -> None:
    own, other = keys(), keys()
    locked, open_ = with_keys(own, other[0]), Config(transport="zmq")
    with pytest.raises(TransferFailed, match="configure both sides alike"):
        await pull_between(*((locked, open_) if secured == "P" else (open_, locked)))
