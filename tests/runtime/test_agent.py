"""Agents over real ZeroMQ sockets in one process: the public API, its errors and its endings."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest
import zmq

from pd_connector import Agent, Config, ConfigError, LocalProtocolError, Ticket, TransferFailed
from pd_connector.errors import LayoutMismatch, LeaseExpired, PeerLost
from pd_connector.protocol import events as ev
from pd_connector.protocol.context import Limits

LAYERS, BLOCKS, BYTES = 3, 32, 4096
QUICK = Limits(hello=20.0, retry=0.1, park=0.3, settle=0.3)


def zmq_only(**settings: object) -> Config:
    return msgspec.structs.replace(Config(transport="zmq"), **settings)


def cache(seed: int | None = None, blocks: int = BLOCKS) -> np.ndarray:
    if seed is None:
        return np.zeros((LAYERS, blocks, BYTES), np.uint8)
    return np.random.default_rng(seed).integers(1, 255, (LAYERS, blocks, BYTES), np.uint8)


@contextlib.asynccontextmanager
async def pair(
    p_config: Config | None = None, d_config: Config | None = None
) -> AsyncIterator[tuple[Agent, np.ndarray, Agent, np.ndarray]]:
    """P with content, D with zeros."""
    source, destination = cache(1), cache()
    async with (
        Agent(p_config or zmq_only(), name="P", limits=QUICK) as p,
        Agent(d_config or zmq_only(), name="D", limits=QUICK) as d,
    ):
        p.register(list(source))
        d.register(list(destination))
        yield p, source, d, destination


async def quiet(*agents: Agent) -> None:
    """Nothing is leased, read, kept or in quarantine."""
    for _ in range(100):
        if not any(value for agent in agents for key, value in agent.gauges().items() if key != "peers"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError([agent.gauges() for agent in agents])


@pytest.mark.parametrize("audit", [False, True])
async def test_a_pull_moves_exactly_the_leased_blocks(audit: bool) -> None:
    async with pair(d_config=zmq_only(audit=audit)) as (p, source, d, destination):
        ticket = p.lease([3, 4, 9], tokens=40)
        stats = await d.pull(ticket, [7, 1, 2])
        assert (destination[:, [7, 1, 2]] == source[:, [3, 4, 9]]).all()
        assert not np.delete(destination, [7, 1, 2], axis=1).any()
        assert stats.bytes == 3 * LAYERS * BYTES
        assert stats.transport == "zmq"
        assert stats.digests_compared == (3 * LAYERS if audit else 0)
        await quiet(p, d)


@pytest.mark.parametrize(
    "wrong", [{"blocks": ((4, 3, 9),)}, {"blocks": ((3, 4),)}, {"tokens": 41}, {"key": b"another"}], ids=str
)
async def test_a_ticket_that_was_changed_on_its_way_is_refused(wrong: dict[str, object]) -> None:
    async with pair() as (p, _, d, _):
        ticket = p.lease([3, 4, 9], tokens=40, key=b"key")
        changed = msgspec.structs.replace(ticket, **wrong)
        with pytest.raises(TransferFailed, match="was changed on its way"):
            await d.pull(changed, [7, 1, 2][: len(changed.blocks[0])])


async def test_fewer_blocks_than_the_ticket_has_may_be_pulled() -> None:
    async with pair() as (p, source, d, destination):
        await d.pull(p.lease([3, 4, 9]), [7], skip_blocks=1, partial=True)
        assert (destination[:, 7] == source[:, 4]).all()
        assert not np.delete(destination, 7, axis=1).any()
        with pytest.raises(LocalProtocolError, match="1 source blocks but 2 destination"):
            await d.pull(p.lease([3, 4]), [7, 8], skip_blocks=1, partial=True)
        await quiet(d)


async def test_audit_catches_what_changed_under_the_lease() -> None:
    async with pair(d_config=zmq_only(audit=True)) as (p, source, d, _):
        ticket = p.lease([3, 4])
        moved = asyncio.Event()
        feed = d._courier._feed  # type: ignore[union-attr]

        def on_event(event: ev.Event) -> None:
            if isinstance(event, ev.Completed) and event.status == "done":
                source[1, 4, 100] ^= 1
                moved.set()
            feed(event)

        d._courier._feed = on_event  # type: ignore[union-attr]
        with pytest.raises(TransferFailed, match="audit: 1 of 6 digests differ, first in block 4 of grid 1"):
            await d.pull(ticket, [0, 1])
        assert moved.is_set()
        await quiet(p, d)


async def test_layers_come_in_order_and_may_be_used_at_once() -> None:
    async with pair() as (p, source, d, destination):
        ticket = p.lease([5, 6])
        seen = []
        async for layer in d.pull_layers(ticket, [10, 11]):
            assert (destination[layer, [10, 11]] == source[layer, [5, 6]]).all()
            seen.append(layer)
        assert seen == list(range(LAYERS))
        await quiet(p, d)


async def test_a_caller_that_stops_taking_layers_leaves_nothing() -> None:
    async with pair() as (p, _, d, _):
        layers = d.pull_layers(p.lease([5, 6]), [10, 11])
        async for _ in layers:
            break
        await layers.aclose()  # type: ignore[attr-defined]
        await quiet(p, d)


async def test_a_cancelled_pull_returns_when_the_destination_is_quiet() -> None:
    async with pair() as (p, _, d, destination):
        task = asyncio.create_task(d.pull(p.lease(list(range(BLOCKS))), list(range(BLOCKS))))
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        destination[:] = 77  # ours again: nobody may write here any more
        await asyncio.sleep(0.3)
        assert (destination == 77).all()
        await quiet(p, d)


async def test_two_readers_end_the_lease_together() -> None:
    async with pair() as (p, source, d, destination), Agent(zmq_only(), name="D2", limits=QUICK) as second:
        other = cache()
        second.register(list(other))
        ticket = p.lease([1, 2], readers=2)
        ended = asyncio.create_task(p.lease_ended(ticket))
        await d.pull(ticket, [1, 2])
        await asyncio.sleep(0.1)
        assert not ended.done()
        await second.pull(ticket, [1, 2])
        assert await asyncio.wait_for(ended, 5) == "every reader has its blocks"
        assert (other[:, [1, 2]] == source[:, [1, 2]]).all()
        assert (destination == other).all()


async def test_release_and_end_free_the_blocks_at_once() -> None:
    async with pair() as (p, _, d, _):
        first, second = p.lease([1]), p.lease([2])
        ends = [asyncio.create_task(p.lease_ended(ticket)) for ticket in (first, second)]
        await asyncio.sleep(0)
        d.release(first, whole=True)
        p.end(second.lease, "preempted")
        reasons = await asyncio.wait_for(asyncio.gather(*ends), 5)
        assert reasons[1] == "preempted"
        with pytest.raises(TransferFailed, match="preempted") as caught:
            await d.pull(second, [0])
        assert isinstance(caught.value.__cause__, LeaseExpired)
        assert caught.value.failed_blocks == (0,)


async def test_an_expired_lease_is_not_served() -> None:
    async with pair(p_config=zmq_only(lease_seconds=0.2, lease_cap_seconds=0.2)) as (p, _, d, _):
        ticket = p.lease([1])
        assert await asyncio.wait_for(p.lease_ended(ticket), 5) == "it expired"
        with pytest.raises(TransferFailed, match="it expired"):
            await d.pull(ticket, [0])
        await quiet(p, d)


async def test_a_kept_ticket_outlives_its_lease_time_and_its_loss_is_told() -> None:
    notes: list[ev.Note] = []
    source = cache(1)
    async with (
        Agent(zmq_only(lease_seconds=0.3, lease_cap_seconds=30), name="P", limits=QUICK) as p,
        Agent(zmq_only(), name="D", limits=QUICK, on_note=notes.append) as d,
    ):
        p.register(list(source))
        ticket = p.lease([1])
        d.keep(ticket)
        await asyncio.sleep(1.0)
        assert p.gauges()["leases"] == 1
        p.end(ticket.lease, "taken back")
        for _ in range(100):
            if any(isinstance(note, ev.TicketLost) for note in notes):
                break
            await asyncio.sleep(0.05)
        assert ev.TicketLost(ticket) in notes
        await quiet(p, d)


@pytest.mark.parametrize("field", ["capability", "epoch", "lease", "incarnation", "blocks"])
async def test_a_forged_ticket_gets_nothing(field: str) -> None:
    async with pair() as (p, _, d, destination):
        ticket = p.lease([1])
        p.lease([2])
        forged = {
            "capability": bytes(16),
            "epoch": 9,
            "lease": 2,
            "incarnation": ticket.incarnation ^ 1,
            "blocks": ((2,),),
        }[field]
        with pytest.raises(TransferFailed) as caught:
            await d.pull(msgspec.structs.replace(ticket, **{field: forged}), [0], timeout=5)
        assert isinstance(caught.value.__cause__, LeaseExpired | PeerLost)
        assert not destination.any()
        if field != "blocks":  # who has the capability is a reader, and its failed pull gave the lease back
            await d.pull(ticket, [0])


async def test_another_model_or_layout_is_refused_in_words() -> None:
    async with pair() as (p, _, d, _), Agent(zmq_only(), name="small", limits=QUICK) as small:
        small.register(list(cache()[:2]))
        with pytest.raises(TransferFailed, match=r"layers: ours 2, theirs 3, only there: layer\.2") as caught:
            await small.pull(p.lease([1]), [0])
        assert isinstance(caught.value.__cause__, LayoutMismatch)
        p.identify("llama")
        d.identify("qwen")
        with pytest.raises(TransferFailed, match="model: ours 'qwen', theirs 'llama'"):
            await d.pull(p.lease([1]), [0])


async def test_a_peer_that_never_answers_costs_one_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with pair() as (p, _, _, _), Agent(zmq_only(), name="D", limits=Limits(hello=1.0)) as d:
            d.register(list(cache()))
            port = silent.getsockname()[1]
            ticket = msgspec.structs.replace(p.lease([1]), address=f"tcp://127.0.0.1:{port}")
            with pytest.raises(TransferFailed, match=r"did not finish HELLO within 1 s; check that it runs"):
                await asyncio.wait_for(d.pull(ticket, [0]), 10)


async def test_nobody_listens() -> None:
    async with pair() as (p, _, d, _):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ticket = msgspec.structs.replace(p.lease([1]), address=f"tcp://127.0.0.1:{port}")
        with pytest.raises(TransferFailed):
            await asyncio.wait_for(d.pull(ticket, [0], timeout=2), 10)


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*in use.*choose a free port"):
            async with Agent(zmq_only(port=port)):
                pass


async def test_an_owner_that_restarts_at_its_address_is_noticed_and_found_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source, destination = cache(1), cache()
    async with Agent(zmq_only(), name="D", limits=QUICK) as d:
        d.register(list(destination))
        async with Agent(zmq_only(port=port), name="P", limits=QUICK) as p:
            p.register(list(source))
            old = p.lease([2])
            await d.pull(p.lease([1]), [1])
        async with Agent(zmq_only(port=port), name="P", limits=QUICK) as p:
            p.register(list(source))
            with pytest.raises(TransferFailed, match="restarted"):
                await asyncio.wait_for(d.pull(old, [5]), 10)
            await d.pull(p.lease([3]), [3])
            assert (destination[:, 3] == source[:, 3]).all()
            assert not destination[:, 5].any()


async def test_drain_waits_for_readers_and_then_grants_nothing() -> None:
    async with pair() as (p, _, d, _):
        ticket = p.lease([1])
        drained = asyncio.create_task(p.drain(10))
        await asyncio.sleep(0.1)
        assert not drained.done()
        with pytest.raises(LocalProtocolError, match="draining"):
            p.lease([2])
        await d.pull(ticket, [0])
        assert await asyncio.wait_for(drained, 5)


async def test_drain_gives_up_after_its_time() -> None:
    async with pair() as (p, _, _, _):
        p.lease([1])
        assert not await p.drain(0.2)


async def test_close_of_the_owner_fails_the_pull() -> None:
    async with pair() as (p, _, d, _):
        await d.pull(p.lease([1]), [1])
        ticket = p.lease(list(range(BLOCKS)))
        await p.close()
        with pytest.raises(TransferFailed):
            await asyncio.wait_for(d.pull(ticket, list(range(BLOCKS)), timeout=5), 10)


async def test_close_of_the_reader_ends_its_pulls() -> None:
    async with pair() as (p, _, d, _):
        task = asyncio.create_task(d.pull(p.lease(list(range(BLOCKS))), list(range(BLOCKS))))
        await asyncio.sleep(0)
        await d.close()
        with pytest.raises(TransferFailed, match="closed"):
            await asyncio.wait_for(task, 5)
        with pytest.raises(LocalProtocolError, match="closed"):
            d.lease([1])


async def test_a_speaker_sends_pulls_on_to_the_rank() -> None:
    async with pair() as (p, source, d, destination), Agent(zmq_only(), name="speaker", limits=QUICK) as speaker:
        speaker.speak_for([p.endpoint(rank=0)])
        ticket = msgspec.structs.replace(p.lease([4]), address=speaker.address, incarnation=speaker.incarnation)
        await d.pull(ticket, [4])
        assert (destination[:, 4] == source[:, 4]).all()
        other = msgspec.structs.replace(p.endpoint().layout, platform="not what the rank itself says")
        speaker.speak_for([msgspec.structs.replace(p.endpoint(), layout=other)])
        lost = msgspec.structs.replace(p.lease([5]), address=speaker.address, incarnation=speaker.incarnation)
        async with Agent(zmq_only(), name="E") as e:
            e.register(list(cache()))
            with pytest.raises(TransferFailed, match="has other memory than whoever speaks for it says"):
                await e.pull(lost, [4])


async def test_local_mistakes_are_refused_before_anything_happens() -> None:
    async with pair() as (p, _, d, _):
        with pytest.raises(LocalProtocolError, match="block 32 cannot be leased: group 0 has 32 blocks"):
            p.lease([32])
        ticket = p.lease([1, 2])
        with pytest.raises(LocalProtocolError, match="2 source blocks but 1 destination"):
            await d.pull(ticket, [1])
        with pytest.raises(LocalProtocolError, match="twice"):
            await d.pull(ticket, [1, 1])
        with pytest.raises(LocalProtocolError, match="does not exist"):
            await d.pull(ticket, [1, 99])
        with pytest.raises(LocalProtocolError, match="registered already"):
            d.register(list(cache()))
        async with Agent(zmq_only()) as empty:
            with pytest.raises(LocalProtocolError, match="register memory"):
                await empty.pull(ticket, [1, 2])
        await d.pull(ticket, [1, 2])


async def test_many_pulls_at_once() -> None:
    async with pair() as (p, source, d, destination):
        tickets = [p.lease([block]) for block in range(BLOCKS)]
        await asyncio.gather(*(d.pull(ticket, [BLOCKS - 1 - i]) for i, ticket in enumerate(tickets)))
        assert (destination[:, ::-1] == source).all()
        assert d.counters()["transfers_done"] == BLOCKS
        await quiet(p, d)


def test_tickets_keep_their_capability_out_of_logs() -> None:
    ticket = Ticket(
        address="tcp://h:1", incarnation=1, lease=1, epoch=1, capability=b"secret-secret-16", blocks=((1,),)
    )
    assert "secret" not in repr(ticket)
    assert b"secret".hex() not in repr(ticket)
    assert Ticket.from_bytes(ticket.to_bytes()) == ticket
    public, secret = (key.decode() for key in zmq.curve_keypair())
    assert secret not in repr(Config(public_key=public, secret_key=secret, allowed_keys=(public,)))


@pytest.mark.parametrize("blocks", [[-1], [1.5], ["a"], [[1], "b"], [2**40], [[[1]]]])
async def test_what_is_no_block_id_is_refused_and_leases_nothing(blocks: list[object]) -> None:
    async with pair() as (p, _, _, _):
        with pytest.raises(LocalProtocolError):
            p.lease(blocks)  # type: ignore[arg-type]
        assert p.gauges()["leases"] == 0


async def test_ids_may_be_numpy_arrays() -> None:
    async with pair() as (p, source, d, destination):
        await d.pull(p.lease(np.array([3, 4])), np.array([5, 6]))  # type: ignore[arg-type]
        assert (destination[:, [5, 6]] == source[:, [3, 4]]).all()
        with pytest.raises(LocalProtocolError, match="skip_blocks"):
            await d.pull(p.lease([3, 4]), [5], skip_blocks=-1)


async def test_a_pull_that_is_cancelled_twice_still_waits_for_quiet() -> None:
    async with pair() as (p, _, d, destination):
        d._courier._transports["zmq"].cancel = lambda tag: None  # type: ignore[union-attr, method-assign]
        task = asyncio.create_task(d.pull(p.lease(list(range(BLOCKS))), list(range(BLOCKS))))
        while d.gauges()["transfers_active"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert d.gauges()["transfers_quarantined"] == 0
        destination[:] = 77
        await asyncio.sleep(0.3)
        assert (destination == 77).all()


async def test_a_release_that_came_before_its_grant_ends_the_lease() -> None:
    async with pair() as (p, _, d, _):
        ticket = msgspec.structs.replace(p.lease([1]), lease=2)
        d.release(ticket, whole=True)
        await asyncio.sleep(0.1)
        p.grant(ticket)
        assert await asyncio.wait_for(p.lease_ended(ticket), 5)
        assert p.gauges()["leases"] == 1


async def test_a_command_that_fails_costs_itself_alone() -> None:
    async with pair() as (p, _, d, _):
        await d.pull(p.lease([1]), [1])
        transport = p._courier._transports["zmq"]  # type: ignore[union-attr]

        def broken(*_: object) -> None:
            raise RuntimeError("broken")

        transport.revoke = broken  # type: ignore[method-assign]
        ticket = p.lease([2])
        ended = asyncio.create_task(p.lease_ended(ticket))
        await asyncio.sleep(0)
        p.end(ticket.lease, "preempted")
        assert await asyncio.wait_for(ended, 5) == "preempted"
        assert p.counters()["commands_failed"] == 1
        transport.grant = broken  # type: ignore[method-assign]
        unserved = p.lease([3])
        assert "before" in await p.lease_ended(unserved)
        assert p.gauges()["leases"] == 0


async def test_an_owner_that_was_not_ready_is_asked_again() -> None:
    async with pair() as (p, source, d, destination), Agent(zmq_only(), name="speaker", limits=QUICK) as speaker:
        where = {"address": speaker.address, "incarnation": speaker.incarnation}
        with pytest.raises(TransferFailed, match="has no memory, nor ranks that have"):
            await d.pull(msgspec.structs.replace(p.lease([4]), **where), [4])
        speaker.speak_for([p.endpoint()])
        await d.pull(msgspec.structs.replace(p.lease([5]), **where), [4])
        assert (destination[:, 4] == source[:, 5]).all()


async def test_a_thousand_addresses_leave_no_connection_behind() -> None:
    async with pair() as (p, _, d, _):
        ticket = p.lease([1])
        for port in range(20000, 21000):
            d.release(msgspec.structs.replace(ticket, address=f"tcp://127.0.0.1:{port}"))
            if port % 50 == 0:
                await asyncio.sleep(0.05)
        for _ in range(100):
            if len(d._side_channel._dialled) < 5:
                break
            await asyncio.sleep(0.1)
        assert len(d._side_channel._dialled) < 5
        await d.pull(p.lease([2]), [2])
