"""A lease that grows while its blocks are written, followed by an instance of other shape: bytes, ends, new epochs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from pd_connector import Agent, Config, LocalProtocolError, PeerLost, TransferFailed
from pd_connector.protocol.context import Limits
from pd_connector.protocol.ticket import Ticket
from pd_connector.testing.instances import Rank, Shape, Style, instance, logical, write

SHAPE = Shape(heads=4, layers=3, channels=8)
STYLES = Style("head-major", "head", 16), Style("token-major", "split", 32)
TOKENS, BLOCKS = 208, 16
QUICK = Limits(retry=0.1, renew=0.5, ask=0.1, park=0.5)


class Instance:
    """Its agents; the first one also answers for the others, as an engine's scheduler side does."""

    def __init__(self, ranks: list[Rank], agents: list[Agent], speaker: Agent, style: Style) -> None:
        self.ranks, self.agents, self.speaker, self.style = ranks, agents, speaker, style
        self.ids = np.arange(1, BLOCKS)

    def grant(self, ticket: Ticket, **options: Any) -> None:
        for agent in (self.speaker, *self.agents):
            agent.grant(ticket, growing=True, **options)

    def compute(self, ticket: Ticket, kv: Any, first: int, last: int, complete: bool = False) -> None:
        """One step of a chunked prefill on every rank: bytes first, then the word."""
        write(self.ranks, kv, self.ids, first, last)
        grown = ticket.with_blocks(self.ids[: -(-last // self.style.block_tokens)].tolist())
        for agent in self.agents:
            agent.grow(grown, [last], complete=complete)


@contextlib.asynccontextmanager
async def started(name: str, style: Style, tp: int, **config: Any) -> AsyncIterator[Instance]:
    settings = Config(transport=("shm", "zmq"), audit=True, **config)
    ranks = instance(SHAPE, style, tp, 1, BLOCKS)
    async with contextlib.AsyncExitStack() as stack:
        agents = [
            await stack.enter_async_context(Agent(settings, name=f"{name}/{rank.layout.rank}", limits=QUICK))
            for rank in ranks
        ]
        for agent, rank in zip(agents, ranks, strict=True):
            agent.register(rank.regions(), rank.layout)
            agent.belong_to([each.layout for each in ranks])
        speaker = await stack.enter_async_context(Agent(settings, name=name, limits=QUICK))
        speaker.speak_for([agent.endpoint(rank.layout.rank) for agent, rank in zip(agents, ranks, strict=True)])
        yield Instance(ranks, agents, speaker, style)


def promise(p: Instance, epoch: int = 1) -> Ticket:
    return Ticket(
        address=p.speaker.address, incarnation=p.speaker.incarnation, lease=1, epoch=epoch,
        capability=secrets.token_bytes(16), blocks=((),), tokens=TOKENS, key=b"k",
    )  # fmt: skip


def targets(d: Instance) -> list[int]:
    return list(range(-(-TOKENS // d.style.block_tokens), 0, -1))


def check(d: Instance, kv: Any, tokens: int) -> None:
    """The first ``tokens`` tokens lie where they belong."""
    ids, at = np.array(targets(d)), np.arange(tokens)
    for rank in d.ranks:
        group = rank.layout.groups[0]
        heads = slice(group.first_head, group.first_head + group.heads)
        for layer, views in rank.views.items():
            for content, view in enumerate(views):
                got = view[ids[at // group.block_tokens], :, at % group.block_tokens]
                assert np.array_equal(got, kv[int(layer.split(".")[1]), content, heads][:, at].swapaxes(0, 1))


def follow(d: Instance, ticket: Ticket, on_part: Any = None, **options: Any) -> list[asyncio.Future[Any]]:
    return [
        asyncio.ensure_future(
            agent.pull(ticket, targets(d), tokens=[(0, TOKENS)], follow=True, on_part=on_part, **options)
        )
        for agent in d.agents
    ]


@contextlib.asynccontextmanager
async def pair(p: int, d: int, **config: Any) -> AsyncIterator[tuple[Instance, Instance, Any]]:
    async with started("P", STYLES[0], p, **config) as owner, started("D", STYLES[1], d, **config) as reader:
        yield owner, reader, logical(SHAPE, STYLES[0], TOKENS)


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
async def test_every_byte_arrives_while_it_is_computed(p: int, d: int) -> None:
    async with pair(p, d) as (owner, reader, kv):
        ticket = promise(owner)
        asked = asyncio.ensure_future(reader.speaker.expect(ticket.address, ticket.capability))
        await asyncio.sleep(0.05)
        owner.grant(ticket)
        assert await asked == ticket
        usable: list[int] = []
        pulls = follow(reader, ticket, usable.append)
        for first in range(0, TOKENS, 48):
            last = min(first + 48, TOKENS)
            owner.compute(ticket, kv, first, last, last == TOKENS)
            if first == 48:  # whole blocks of both sides: 96 tokens
                await until(lambda: usable.count(96) == d)
                check(reader, kv, 96)
        ends = [asyncio.ensure_future(agent.lease_ended(ticket)) for agent in owner.agents]
        stats = await asyncio.gather(*pulls)
        check(reader, kv, TOKENS)
        assert sum(each.digests_compared for each in stats) > 0
        assert set(await asyncio.gather(*ends)) == {"every reader has its blocks"}
        assert not any(agent.gauges()["transfers_active"] for agent in reader.agents)


async def test_what_was_confirmed_is_kept_when_the_owner_dies() -> None:
    async with started("D", STYLES[1], 2) as reader:
        usable: list[int] = []
        async with started("P", STYLES[0], 2) as owner:
            kv, ticket = logical(SHAPE, STYLES[0], TOKENS), promise(owner)
            owner.grant(ticket)
            pulls = follow(reader, ticket, usable.append)
            owner.compute(ticket, kv, 0, 128)
            await until(lambda: usable.count(128) == 2)
        for pull in pulls:
            with pytest.raises(TransferFailed) as failed:
                await pull
            assert set(failed.value.failed_blocks) == set(targets(reader)[4:]), "128 tokens fill four blocks"
        check(reader, kv, 128)


@pytest.mark.parametrize("at", [0, 48, 128])
async def test_a_new_epoch_is_followed_from_what_is_confirmed(at: int) -> None:
    async with pair(2, 1) as (owner, reader, kv):
        usable: list[int] = []
        ticket = promise(owner)
        owner.grant(ticket)
        pulls = follow(reader, ticket, usable.append)
        if at:
            owner.compute(ticket, kv, 0, at)
            await until(lambda: bool(usable))
        for agent in owner.agents:
            agent.end(1, "preempted", again=True)
        for rank in owner.ranks:  # its blocks are another's now
            for grid in rank.grids:
                grid[:] = 255
        await asyncio.sleep(0.7)  # longer than an OPEN is parked
        owner.ids = owner.ids[::-1].copy()
        again = msgspec.structs.replace(ticket, epoch=2)
        for agent in owner.agents:
            agent.grant(again, growing=True)
        owner.compute(again, kv, 0, TOKENS, True)
        (stats,) = await asyncio.gather(*pulls)
        check(reader, kv, TOKENS)
        whole = sum(grid.nbytes // BLOCKS for grid in reader.ranks[0].grids) * len(targets(reader))
        assert stats.bytes <= whole, "nothing that was confirmed is read again"


async def test_blocks_may_be_named_ahead_of_their_tokens() -> None:
    async with pair(1, 1) as (owner, reader, kv):
        usable: list[int] = []
        ticket = promise(owner)
        owner.grant(ticket)
        (pull,) = follow(reader, ticket, usable.append)
        write(owner.ranks, kv, owner.ids, 0, TOKENS)
        for blocks, tokens in ((2, 32), (6, 32), (13, 144), (13, TOKENS)):
            owner.agents[0].grow(ticket.with_blocks(owner.ids[:blocks].tolist()), [tokens], complete=tokens == TOKENS)
            await asyncio.sleep(0.1)
        await pull
        check(reader, kv, TOKENS)


async def test_two_may_expect_the_same() -> None:
    async with pair(1, 1) as (owner, reader, _):
        ticket, agent = promise(owner), reader.speaker
        asked = [asyncio.ensure_future(agent.expect(ticket.address, ticket.capability)) for _ in range(2)]
        await asyncio.sleep(0.05)
        owner.grant(ticket)
        assert await asyncio.wait_for(asyncio.gather(*asked), 5) == [ticket, ticket]
        for answer in await asyncio.gather(
            *(agent.expect(ticket.address, bytes(16), 0.3) for _ in range(2)), return_exceptions=True
        ):
            assert isinstance(answer, PeerLost)


async def test_a_renounced_capability_ends_the_wait_and_the_lease() -> None:
    async with pair(1, 1) as (owner, reader, _):
        ticket = promise(owner)
        waiting = asyncio.ensure_future(reader.speaker.expect(ticket.address, ticket.capability))
        await asyncio.sleep(0.05)
        async with Agent(name="router") as router:
            router.disclaim(ticket.address, ticket.capability, renounce=True)
            with pytest.raises(PeerLost, match="released by whoever brokers"):
                await waiting
        owner.speaker.grant(ticket, growing=True)
        assert owner.speaker.gauges()["leases"] == 0


async def test_nobody_there_is_noticed_at_once() -> None:
    async with Agent(limits=QUICK) as agent:
        with pytest.raises(PeerLost, match="nobody answers"):
            await asyncio.wait_for(agent.expect("tcp://127.0.0.1:9", bytes(16)), 5)
        with pytest.raises(LocalProtocolError, match="tcp://HOST:PORT"):
            await agent.expect("127.0.0.1:9", bytes(16))
        with pytest.raises(LocalProtocolError, match="16 bytes"):
            await agent.expect("tcp://127.0.0.1:9", b"short")


async def test_cancelling_leaves_nothing_behind() -> None:
    async with pair(2, 1) as (owner, reader, kv):
        ticket = promise(owner)
        owner.grant(ticket)
        (pull,) = follow(reader, ticket)
        owner.compute(ticket, kv, 0, 96)
        await asyncio.sleep(0.1)
        ends = [asyncio.ensure_future(agent.lease_ended(ticket)) for agent in owner.agents]
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        await asyncio.wait_for(asyncio.gather(*ends), 5)
        assert reader.agents[0].gauges()["transfers_quarantined"] == 0


async def test_a_lease_that_is_complete_too_early_fails() -> None:
    async with pair(1, 1) as (owner, reader, kv):
        ticket = promise(owner)
        owner.grant(ticket)
        (pull,) = follow(reader, ticket)
        owner.compute(ticket, kv, 0, 96, True)
        with pytest.raises(TransferFailed, match="complete with 96 of 208 tokens"):
            await pull


async def test_what_cannot_be_followed_is_refused_at_once() -> None:
    async with pair(1, 1) as (owner, reader, _):
        (agent,) = reader.agents
        for options in ({}, {"tokens": [(0, TOKENS)], "by_layer": True}):
            with pytest.raises(LocalProtocolError, match="followed by token ranges"):
                agent.start_pull(promise(owner), targets(reader), follow=True, **options)
        ticket = promise(owner)
        owner.grant(ticket)
        with pytest.raises(LocalProtocolError, match="1 groups, 2 counts"):
            owner.agents[0].grow(ticket, [1, 2])
        with pytest.raises(LocalProtocolError, match="cannot be leased"):
            owner.agents[0].grow(ticket.with_blocks([BLOCKS]), [16])
