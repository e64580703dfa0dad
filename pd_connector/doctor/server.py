"""``pdc doctor --serve``: agents with test memory, to be measured from elsewhere.

One agent speaks for two ranks, as a vLLM instance's does: the memory of ``owned`` is a shared pool, that of ``foreign``
is private, as an engine's usually is. Run as a module it serves the self-test of ``pdc doctor``: the configuration is
its argument, the address a line on stdout, and it ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable

import msgspec

from pd_connector.bench.work import Cache
from pd_connector.config import Config, parse
from pd_connector.doctor.link import BLOCKS, CAPABILITY, CHUNK_BYTES, LEASE
from pd_connector.errors import LeaseExpired, PDError
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.agent import Agent

MODEL = "pdc doctor"
"""Tells whoever greets us that there is test memory here, and of which shape."""
OWNED, FOREIGN = "owned", "foreign"
_LEASE_S = 365 * 86400.0
_READERS = 10_000
"""Those of this package share one name. Somebody who shows more than so many ends the lease, and with it the server: an
owner remembers every name."""

Announce = Callable[[str], None]


async def serve(config: Config, announce: Announce, stop: asyncio.Event) -> None:
    """Serve test memory until ``stop``. Raises ConfigError, TransportUnavailable, and LeaseExpired when some peer
    released what all may read."""
    config = msgspec.structs.replace(config, model=MODEL)
    # The port is the speaker's alone. So are ports of transports the first rank's: two agents cannot share one.
    owned = msgspec.structs.replace(config, port=0)
    foreign = msgspec.structs.replace(owned, transport_options=without(config, "port"))
    async with (
        Agent(config, name="pdc-doctor") as speaker,
        _owner(owned, OWNED) as (first, first_ticket),
        _owner(foreign, FOREIGN) as (second, second_ticket),
    ):
        speaker.speak_for([first.endpoint(0), second.endpoint(1)])
        announce(speaker.address)
        ends = [asyncio.create_task(first.lease_ended(first_ticket))]
        ends.append(asyncio.create_task(second.lease_ended(second_ticket)))
        stopped = asyncio.create_task(stop.wait())
        done, others = await asyncio.wait([stopped, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        if stopped not in done:
            raise LeaseExpired(f"the test memory's lease ended: {done.pop().result()}; start it again")


@contextlib.asynccontextmanager
async def _owner(config: Config, name: str) -> AsyncIterator[tuple[Agent, Ticket]]:
    memory = Cache(CHUNK_BYTES, BLOCKS, pooled=name == OWNED, huge=True)
    memory.fill()
    async with Agent(config, name=name) as agent:
        agent.register([memory.region])
        ticket = lease_ticket(agent.address, agent.incarnation)
        agent.grant(ticket, readers=_READERS, seconds=_LEASE_S)
        yield agent, ticket


def lease_ticket(address: str, incarnation: int) -> Ticket:
    """The lease of all test memory, at the agent that speaks for it or has it."""
    blocks = (tuple(range(2 * BLOCKS)),)
    return Ticket(
        address=address,
        incarnation=incarnation,
        lease=LEASE.number,
        epoch=LEASE.epoch,
        capability=CAPABILITY,
        blocks=blocks,
    )


def without(config: Config, *keys: str) -> dict[str, dict[str, object]]:
    """The transports' options less some keys."""
    return {
        name: {key: value for key, value in options.items() if key not in keys}
        for name, options in config.transport_options.items()
    }


async def serve_until_signal(config: Config, announce: Announce) -> None:
    """Until SIGINT or SIGTERM. Raises as ``serve``."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(config, announce, stop)


async def _serve_until_parent_ends(config: Config) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(sys.stdin, stop.set)  # nothing is ever written to it
    await serve(config, lambda address: print(json.dumps({"address": address}), flush=True), stop)


if __name__ == "__main__":
    try:
        asyncio.run(_serve_until_parent_ends(parse(json.loads(sys.argv[1]))))
    except PDError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(2)
