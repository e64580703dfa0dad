"""Agents of instances that are divided and arranged differently, with real bytes over real transports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from pd_connector import Agent, Config, LayoutMismatch, LocalProtocolError, Ticket, TransferFailed
from pd_connector.memory import BlockGrid, Region
from pd_connector.testing.instances import Rank, Shape, Style, instance, logical, write

from .test_agent import QUICK, quiet

TOKENS, BLOCKS = 70, 12
SHAPE = Shape(heads=4, layers=3, channels=32)


def config(**more: Any) -> Config:
    return Config(transport=("shm", "zmq"), audit=True, **more)


def regions(rank: Rank) -> list[Region]:
    """One per layer, as different allocations would be."""
    per_layer = len(rank.grids) // len(rank.views)
    return [
        Region(
            grid.ctypes.data,
            grid.nbytes,
            (BlockGrid(0, index // per_layer, 0, grid.shape[1], grid.shape[1], grid.shape[0]),),
            keepalive=grid,
        )
        for index, grid in enumerate(rank.grids)
    ]


@dataclass
class Instance:
    ranks: list[Rank]
    agents: list[Agent]
    speaker: Agent
    style: Style

    def lease(self, ids: list[int]) -> Ticket:
        """What vLLM's scheduler side does: the same lease on every rank, and on the agent that speaks for them."""
        first = self.speaker.lease(ids, tokens=TOKENS)
        for agent in self.agents:
            agent.grant(first)
        return first

    def ends(self, ticket: Ticket) -> list[asyncio.Task[str]]:
        return [asyncio.ensure_future(agent.lease_ended(ticket)) for agent in self.agents]


@contextlib.asynccontextmanager
async def started(name: str, shape: Shape, style: Style, tp: int, pp: int = 1) -> AsyncIterator[Instance]:
    ranks = instance(shape, style, tp, pp, BLOCKS)
    async with contextlib.AsyncExitStack() as stack:
        agents = []
        for rank in ranks:
            agent = Agent(config(), name=f"{name}/{rank.layout.rank}", limits=QUICK)
            agents.append(await stack.enter_async_context(agent))
            agent.register(regions(rank), rank.layout)
            agent.belong_to([each.layout for each in ranks])
        speaker = await stack.enter_async_context(Agent(Config(), name=name, limits=QUICK))
        speaker.speak_for([agent.endpoint(rank.layout.rank) for agent, rank in zip(agents, ranks, strict=True)])
        yield Instance(ranks, agents, speaker, style)


@contextlib.asynccontextmanager
async def unlike(
    p: tuple[Style, int, int], d: tuple[Style, int, int], shape: Shape = SHAPE
) -> AsyncIterator[tuple[Instance, Instance, Any]]:
    """P with known KV in its blocks from id 1 on, D with nothing."""
    async with started("P", shape, *p) as owner, started("D", shape, *d) as reader:
        kv = logical(shape, p[0], TOKENS)
        write(owner.ranks, kv, np.arange(1, BLOCKS), 0, TOKENS)
        yield owner, reader, kv


def blocks(style: Style, first: int = 0) -> list[int]:
    """D's blocks for tokens from ``first`` on, last one first."""
    return list(range(-(-TOKENS // style.block_tokens) - first // style.block_tokens, 0, -1))


def expected(d: Instance, kv: Any, first: int = 0) -> None:
    """Every token is where it belongs; beyond them only the rest of the last block was written."""
    ids = np.zeros(BLOCKS, np.int64)
    mine = blocks(d.style, first)
    at = first // d.style.block_tokens
    ids[at : at + len(mine)] = mine
    for rank in d.ranks:
        group = rank.layout.groups[0]
        heads = slice(group.first_head, group.first_head + group.heads)
        tokens = np.arange(first, TOKENS)
        for layer, views in rank.views.items():
            for content, view in enumerate(views):
                got = view[ids[tokens // group.block_tokens], :, tokens % group.block_tokens]
                wanted = kv[int(layer.split(".")[1]), content, heads][:, tokens].swapaxes(0, 1)
                assert np.array_equal(got, wanted), (rank.layout.rank, layer, content)


async def pull_all(d: Instance, ticket: Ticket, first: int = 0, **options: Any) -> list[Any]:
    mine = blocks(d.style, first)
    return await asyncio.gather(*(a.pull(ticket, mine, tokens=[(first, TOKENS)], **options) for a in d.agents))


HEADS = Style("head-major", "head", 16)


@pytest.mark.parametrize(
    ("p", "d"),
    [
        ((HEADS, 2, 1), (HEADS, 1, 1)),
        ((HEADS, 1, 1), (HEADS, 2, 1)),
        ((HEADS, 4, 1), (Style("token-major", "split", 32), 2, 1)),
        ((Style("token-major", "inner", 8), 1, 1), (Style("head-major", "outer", 16), 4, 1)),
        ((HEADS, 8, 1), (HEADS, 2, 1)),
        ((HEADS, 1, 3), (Style("head-major", "head", 48), 2, 1)),
        ((HEADS, 2, 1), (HEADS, 1, 3)),
        ((Style(kv="latent"), 4, 1), (Style(kv="latent", block_tokens=8), 2, 1)),
    ],
    ids=["2-1", "1-2", "4-2 and arrangement", "1-4 and arrangement", "replicas", "stages", "to stages", "latents"],
)
@pytest.mark.parametrize("first", [0, 48])
async def test_every_byte_arrives_and_every_lease_ends(p: Any, d: Any, first: int) -> None:
    async with unlike(p, d) as (owner, reader, kv):
        ticket = owner.lease(list(range(1, -(-TOKENS // p[0].block_tokens) + 1)))
        ends = owner.ends(ticket)
        stats = await pull_all(reader, ticket, first)
        expected(reader, kv, first)
        assert sum(one.digests_compared for one in stats) > 0
        reasons = await asyncio.wait_for(asyncio.gather(*ends), 5)
        assert set(reasons) <= {"every reader has its blocks", *(f"released by {a.name}" for a in reader.agents)}
        await quiet(*owner.agents, *reader.agents)


async def test_a_lease_is_held_until_every_rank_that_reads_has_read() -> None:
    async with unlike((HEADS, 1, 1), (HEADS, 2, 1)) as (owner, reader, kv):
        ticket = owner.lease([1, 2, 3, 4, 5])
        (end,) = owner.ends(ticket)
        first, second = reader.agents
        await first.pull(ticket, blocks(HEADS), tokens=[(0, TOKENS)])
        await asyncio.sleep(0.1)
        assert not end.done()
        await second.pull(ticket, blocks(HEADS), tokens=[(0, TOKENS)])
        assert await asyncio.wait_for(end, 5) == "every reader has its blocks"
        expected(reader, kv)


async def test_layers_come_when_every_rank_confirmed_them() -> None:
    async with unlike((HEADS, 2, 1), (HEADS, 1, 1)) as (owner, reader, kv):
        (agent,) = reader.agents
        ticket = owner.lease([1, 2, 3, 4, 5])
        seen = [layer async for layer in agent.pull_layers(ticket, blocks(HEADS), tokens=[(0, TOKENS)])]
        assert sorted(seen) == [0, 1, 2]
        expected(reader, kv)


@pytest.mark.parametrize("lost", [0, 1])
async def test_one_rank_that_does_not_hold_fails_the_whole(lost: int) -> None:
    async with unlike((HEADS, 2, 1), (HEADS, 1, 1)) as (owner, reader, _):
        ticket = owner.lease([1, 2, 3, 4, 5])
        ends = owner.ends(ticket)
        owner.agents[lost].end(ticket.lease, "preempted")
        with pytest.raises(TransferFailed, match="preempted") as caught:
            await pull_all(reader, ticket)
        assert caught.value.failed_blocks == tuple(sorted(blocks(HEADS)))
        await asyncio.wait_for(asyncio.gather(*ends), 5)
        await quiet(*owner.agents, *reader.agents)


async def test_one_rank_that_is_gone_fails_the_whole() -> None:
    async with unlike((HEADS, 2, 1), (HEADS, 1, 1)) as (owner, reader, _):
        await pull_all(reader, owner.lease([1, 2, 3, 4, 5]))
        ticket = owner.lease([1, 2, 3, 4, 5])
        end = asyncio.ensure_future(owner.agents[0].lease_ended(ticket))
        await owner.agents[1].close()
        with pytest.raises(TransferFailed):
            await pull_all(reader, ticket)
        assert "D/0" in await asyncio.wait_for(end, 5) or end.result() == "every reader has its blocks"
        await quiet(owner.agents[0], *reader.agents)


async def test_a_pull_that_is_aborted_while_it_greets() -> None:
    async with unlike((HEADS, 2, 1), (HEADS, 1, 1)) as (owner, reader, _):
        ticket = owner.lease([1, 2, 3, 4, 5])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pull_all(reader, ticket), 0)
        await quiet(*reader.agents)


async def test_what_cannot_be_served_is_refused_in_words() -> None:
    other = Shape(heads=2, layers=3, channels=32)
    async with started("P", SHAPE, HEADS, 2) as owner, started("D", other, HEADS, 1) as reader:
        with pytest.raises(TransferFailed, match="KV heads of the model: ours 2, theirs 4") as caught:
            await pull_all(reader, owner.lease([1, 2, 3, 4, 5]))
        assert isinstance(caught.value.__cause__, LayoutMismatch)
    async with started("P", Shape(4, 2, 32), HEADS, 1) as owner, started("D", SHAPE, HEADS, 1) as reader:
        with pytest.raises(TransferFailed, match=r"layers: ours 3, theirs 2, missing there: layer\.2"):
            await pull_all(reader, owner.lease([1, 2, 3, 4, 5]))


async def test_block_sizes_that_differ_need_tokens() -> None:
    async with unlike((HEADS, 1, 1), (Style("head-major", "head", 32), 1, 1)) as (owner, reader, kv):
        (agent,) = reader.agents
        ticket = owner.lease([1, 2, 3, 4, 5])
        with pytest.raises(TransferFailed, match="32 tokens here, 16 there: name tokens"):
            await agent.pull(ticket, [3, 2, 1, 4, 5])
        for tokens in ([(0, 71)], [(5, 3)], [(0, 0)], [(0, 16), (0, 16)]):
            with pytest.raises((LocalProtocolError, TransferFailed)):
                await agent.pull(ticket, [3, 2], tokens=tokens)
        await agent.pull(owner.lease([1, 2, 3, 4, 5]), [3, 2, 1], tokens=[(0, TOKENS)])
        expected(reader, kv)


async def test_an_instance_is_made_of_different_ranks() -> None:
    async with started("D", SHAPE, HEADS, 2) as reader:
        first, second = reader.agents
        mine = first.endpoint(0).layout
        for wrong in ([], [second.endpoint(1).layout], [mine, mine]):
            with pytest.raises(LocalProtocolError, match="ranks of different numbers"):
                first.belong_to(wrong)
    async with Agent(config()) as bare:
        with pytest.raises(LocalProtocolError, match="register memory first"):
            bare.endpoint()


async def test_a_layout_must_be_that_of_the_memory() -> None:
    (rank,) = instance(SHAPE, HEADS, 1, 1, BLOCKS)
    group = rank.layout.groups[0]
    fewer = msgspec.structs.replace(group, layers=group.layers[:2], form_of=group.form_of[:2])
    async with Agent(config()) as agent:
        with pytest.raises(LocalProtocolError, match="describes 2 grids of 1 groups"):
            agent.register(regions(rank), msgspec.structs.replace(rank.layout, groups=(fewer,)))
        agent.register(regions(rank), rank.layout)
