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

from pd_connector import (
    Agent,
    Config,
    Form,
    GroupLayout,
    KVLayout,
    LayoutMismatch,
    LocalProtocolError,
    Part,
    Ticket,
    TransferFailed,
    heads_of_rank,
)
from pd_connector.memory import BlockGrid, Region
from pd_connector.testing.instances import Rank, Shape, Style, instance, logical, write

from .test_agent import QUICK, quiet

TOKENS, BLOCKS = 70, 12
SHAPE = Shape(heads=4, layers=3, channels=32)


def config(**more: Any) -> Config:
    return Config(transport=("shm", "zmq"), audit=True, **more)


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
            agent.register(rank.regions(), rank.layout)
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
            agent.register(rank.regions(), msgspec.structs.replace(rank.layout, groups=(fewer,)))
        agent.register(rank.regions(), rank.layout)


# --- what a stranger found --------------------------------------------------------------------------------------------


def two_groups(rank: int, ranks: int, layers: tuple[str, ...] = ("a", "b")) -> KVLayout:
    """A latent, and a group whose heads are divided; 8 bytes per token and head."""
    first, heads = heads_of_rank(2, ranks, rank)
    part = Part(name="x", unit_bytes=8, token_stride=8, head_stride=8 * 16)
    latent = GroupLayout(
        kind="latent", block_tokens=16, dtype="u8", layers=("latent",), form_of=(0,),
        forms=(Form(block_bytes=(128,), parts=(part,)),),
    )  # fmt: skip
    split = GroupLayout(
        kind="full", block_tokens=16, heads=heads, first_head=first, total_heads=2, dtype="u8", layers=layers,
        forms=(Form(block_bytes=(128 * heads,), parts=(part,)),), form_of=(0,) * len(layers),
    )  # fmt: skip
    return KVLayout(rank=rank, ranks=ranks, groups=(latent, split))


def memory_of(layout: KVLayout, fill: int) -> tuple[list[Region], list[np.ndarray]]:
    arrays, out = [], []
    for group, one in enumerate(layout.groups):
        for size in one.grid_bytes:
            array = np.full((8, size), fill + len(arrays), np.uint8)
            arrays.append(array)
            grid = BlockGrid(group, len(arrays) - 1, 0, size, size, 8)
            out.append(Region(array.ctypes.data, array.nbytes, (grid,), keepalive=array))
    return out, arrays


@contextlib.asynccontextmanager
async def grouped(p: list[KVLayout], d: KVLayout) -> AsyncIterator[tuple[list[Agent], Agent, Agent, list[np.ndarray]]]:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        owners = [await enter(Agent(config(), name=f"P/{layout.rank}", limits=QUICK)) for layout in p]
        for agent, layout in zip(owners, p, strict=True):
            agent.register(memory_of(layout, 10 + layout.rank)[0], layout)
        speaker = await enter(Agent(Config(), name="P", limits=QUICK))
        speaker.speak_for([agent.endpoint(layout.rank) for agent, layout in zip(owners, p, strict=True)])
        reader = await enter(Agent(config(), name="D", limits=QUICK))
        mine, arrays = memory_of(d, 200)
        reader.register(mine, d)
        yield owners, speaker, reader, arrays


async def test_groups_of_which_nothing_is_asked_announce_nothing() -> None:
    """The latent comes from one rank; the other rank, of which nothing is wanted, must not speak for it."""
    async with grouped([two_groups(0, 2), two_groups(1, 2)], two_groups(0, 1)) as (owners, speaker, reader, arrays):
        ticket = speaker.lease([[1, 2], [3]], tokens=32)
        for owner in owners:
            owner.grant(ticket)
        ends = [asyncio.ensure_future(owner.lease_ended(ticket)) for owner in owners]
        seen = []
        async for layer in reader.pull_layers(ticket, [[5, 6], []], tokens=[(0, 32), (0, 0)]):
            assert (arrays[0][[5, 6]] == 10).all()
            seen.append(layer)
        assert seen == [0]
        await asyncio.wait_for(asyncio.gather(*ends), 5)
        await quiet(reader, *owners)


async def test_groups_are_not_mixed_up() -> None:
    async with grouped([two_groups(0, 2), two_groups(1, 2)], two_groups(0, 1)) as (owners, speaker, reader, arrays):
        ticket = speaker.lease([[1, 2], [3, 4]], tokens=32)
        for owner in owners:
            owner.grant(ticket)
        await reader.pull(ticket, [[5, 6], [7, 0]], tokens=[(0, 32), (0, 32)])
        assert (arrays[0][[5, 6]] == 10).all()
        for layer in (1, 2):
            assert (arrays[layer][[7, 0], :128] == 10 + layer).all()
            assert (arrays[layer][[7, 0], 128:] == 11 + layer).all()
            assert (arrays[layer][1:7] == 200 + layer).all()


async def test_a_stage_without_layers_of_a_group() -> None:
    stages = [two_groups(0, 1), two_groups(0, 1, layers=())]
    owner_stages = [KVLayout(rank=n, ranks=2, groups=layout.groups) for n, layout in enumerate(stages)]
    owner_stages[1] = KVLayout(rank=1, ranks=2, groups=(no_latent(owner_stages[1]), owner_stages[1].groups[1]))
    async with grouped(owner_stages[:1], KVLayout(groups=owner_stages[0].groups)) as (owners, _, reader, arrays):
        await reader.pull(owners[0].lease([[1], [2]], tokens=16), [[3], [4]], tokens=[(0, 16), (0, 16)])
        assert (arrays[0][3] == 10).all()
    async with Agent(config()) as bare:
        memory, _ = memory_of(two_groups(0, 1, layers=()), 0)
        bare.register(memory, two_groups(0, 1, layers=()))
        ticket = bare.lease([[1], [700]], tokens=16)  # ids of a group that lies elsewhere are only numbers here
        bare.end(ticket.lease, "done")


def no_latent(layout: KVLayout) -> GroupLayout:
    return msgspec.structs.replace(layout.groups[0], layers=(), form_of=())


@pytest.mark.parametrize("swap", [False, True], ids=["another number", "swapped"])
async def test_a_directory_that_lies_about_its_ranks_ends_the_pull(swap: bool) -> None:
    async with unlike((HEADS, 2, 1), (HEADS, 1, 1)) as (owner, reader, _):
        first, second = (agent.endpoint(n) for n, agent in enumerate(owner.agents))
        replace = msgspec.structs.replace
        lies = [replace(first, rank=1), replace(second, rank=0)] if swap else [replace(first, rank=7), second]
        owner.speaker.speak_for(lies)
        with pytest.raises(TransferFailed, match="with the layouts of others"):
            await asyncio.wait_for(pull_all(reader, owner.lease([1, 2, 3, 4, 5])), 10)
        await quiet(*reader.agents)


@pytest.mark.parametrize(
    "tokens",
    [
        [(0.0, 70.0)],
        [(0, float("inf"))],
        [(0, None)],
        [(0,)],
        5,
        "ab",
        [(True, 70)],
        [(-1, 5)],
        [(0, 2**70)],
        [(0, 71)],
    ],
)
async def test_ranges_that_are_none_are_refused_at_once(tokens: Any) -> None:
    async with unlike((HEADS, 1, 1), (HEADS, 1, 1)) as (owner, reader, _):
        (agent,) = reader.agents
        with pytest.raises(LocalProtocolError):
            await asyncio.wait_for(agent.pull(owner.lease([1, 2, 3, 4, 5]), [5, 4, 3, 2, 1], tokens=tokens), 5)
        assert not agent.core.reader.meetings


async def test_a_range_in_the_middle_writes_nothing_behind_it() -> None:
    async with unlike((HEADS, 1, 1), (HEADS, 1, 1)) as (owner, reader, kv):
        (agent,), (rank,) = reader.agents, reader.ranks
        for array in rank.grids:
            array[:] = 7
        await agent.pull(owner.lease([1, 2, 3, 4, 5]), [3], tokens=[(np.uint8(16), np.uint32(24))])
        for layer, views in rank.views.items():
            for content, view in enumerate(views):
                assert np.array_equal(view[3, :, :8], kv[int(layer.split(".")[1]), content, :, 16:24])
                assert (view[3, :, 8:] == 7).all()


async def test_joining_an_instance_later_counts_from_then_on() -> None:
    async with unlike((HEADS, 1, 1), (HEADS, 2, 1)) as (owner, reader, kv):
        layouts = [rank.layout for rank in reader.ranks]
        first = reader.agents[0]
        first.belong_to(layouts[:1])
        await first.pull(owner.lease([1, 2, 3, 4, 5]), blocks(HEADS), tokens=[(0, TOKENS)])
        first.belong_to(layouts)
        await pull_all(reader, owner.lease([1, 2, 3, 4, 5]))
        expected(reader, kv)


async def test_instances_of_different_sizes_under_one_lease() -> None:
    async with (
        unlike((HEADS, 1, 1), (HEADS, 2, 1)) as (owner, two, kv),
        started("E", SHAPE, HEADS, 1) as one,
    ):
        ticket = owner.speaker.lease([1, 2, 3, 4, 5], tokens=TOKENS)
        owner.agents[0].grant(ticket, readers=2)
        (end,) = owner.ends(ticket)
        await pull_all(two, ticket)
        assert not end.done()
        await pull_all(one, ticket)
        assert await asyncio.wait_for(end, 5) == "every reader has its blocks"
        expected(one, kv)
        expected(two, kv)
