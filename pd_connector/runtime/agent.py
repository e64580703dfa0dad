"""Agent: the public asyncio API. It feeds the protocol core with events and carries its commands out."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as replace_fields

from pd_connector.config import Config
from pd_connector.errors import LocalProtocolError, PeerLost
from pd_connector.layout import KVLayout
from pd_connector.memory import Region, order_grids
from pd_connector.protocol import events as ev
from pd_connector.protocol.context import Identity, Limits
from pd_connector.protocol.core import Core
from pd_connector.protocol.messages import CAPABILITY_BYTES, Account, Endpoint, Saved
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.arguments import (
    block_groups,
    check_address,
    check_bytes,
    check_count,
    check_list,
    check_seconds,
)
from pd_connector.runtime.courier import Courier
from pd_connector.runtime.driver import Driver
from pd_connector.runtime.outcome import patiently, stats_of
from pd_connector.runtime.planner import Planner
from pd_connector.runtime.pulls import Order, Pulls
from pd_connector.runtime.side_channel import SideChannel
from pd_connector.runtime.windows import Windows
from pd_connector.tensors import check_layout, describe_grids, to_regions

logger = logging.getLogger(__name__)

NoteListener = Callable[[ev.Note], None]


class Agent:
    """One participant: owns registered memory, leases blocks of it, pulls blocks of others into it.

    Use it as ``async with Agent(config) as agent``. All methods belong to the loop that entered it; engines without a
    loop use runtime.portal. ``on_note`` sees every note of the core, on the loop.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        name: str = "",
        limits: Limits | None = None,
        on_note: NoteListener | None = None,
    ) -> None:
        self.config = config or Config()
        incarnation = secrets.randbits(63) | 1
        self.core = Core(Identity(name or f"agent-{incarnation:016x}", incarnation, self.config.model), limits)
        self._on_note = on_note
        self._side_channel = SideChannel(self.config, self._on_frame, self._on_lost, self._hangup_if_unused)
        self._courier: Courier | None = None
        self._driver = Driver(self.core, self._side_channel, self._note, lambda *args: self._pulls.refused(*args))
        self._feed = self._driver.feed
        self._pulls = Pulls(self.name, self._feed, self.core.new_id, self._driver.clock)
        self._lease_ends: dict[int, asyncio.Future[str]] = {}
        self._promises: dict[tuple[str, bytes], list[asyncio.Future[ev.Promised]]] = {}
        self._drained: asyncio.Event = asyncio.Event()
        self._populator = ThreadPoolExecutor(1, thread_name_prefix="pdc-populate")
        self._last_lease = 0
        self._read_only = ""  # a region that is
        self._closing = self._closed = False

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Agent:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closing or not self.address:
            state = "is closed" if self._closing else "was not started"
            raise LocalProtocolError(f"agent {self.name} {state}: use `async with Agent(...)`, or start() it first")

    def start(self) -> None:
        """Listen. Raises ConfigError when the address cannot be bound, LocalProtocolError a second time."""
        if self._closing or self.address:
            raise LocalProtocolError(f"agent {self.name} was started before: make a new one")
        self._loop = asyncio.get_running_loop()
        self._driver.start(self._loop)
        try:
            self._side_channel.start()
        except BaseException:
            self._closing = self._closed = True
            self._side_channel.close()()
            raise

    async def drain(self, seconds: float | None = None) -> bool:
        """Take nothing new and wait until nothing is leased or being read; False when ``seconds`` (default
        ``drain_seconds``) were not enough."""
        self._feed(ev.Drain())
        try:
            await asyncio.wait_for(self._drained.wait(), self.config.drain_seconds if seconds is None else seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End every lease and pull, tell the peers, free everything. Idempotent."""
        if self._closed:
            return
        self._closing = True
        if not self.address:  # never started
            self._closed = True
            return
        self._feed(ev.Close())
        if self._courier is not None:
            self._courier.unwatch()
            quiet = await self._loop.run_in_executor(None, self._courier.close)
            # Whatever is unsettled is settled now: no read writes any more, or its blocks are nobody's ever again.
            for tag in self.core.reader.outstanding_tags():
                self._feed(ev.Completed(tag, "cancelled" if quiet else "abandoned"))
        self._closed = True
        await self._loop.run_in_executor(None, self._populator.shutdown)
        await self._driver.close()
        await self._loop.run_in_executor(None, self._side_channel.close())

    # --- identity and memory ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.core.identity.agent

    @property
    def incarnation(self) -> int:
        return self.core.identity.incarnation

    @property
    def address(self) -> str:
        """What peers dial; part of every ticket."""
        return self._side_channel.address

    @property
    def transports(self) -> tuple[str, ...]:
        """Transports that serve our memory, best first."""
        return tuple(self.core.identity.transports)

    def endpoint(self, rank: int = 0) -> Endpoint:
        """Us as a rank of an instance. Raises LocalProtocolError before memory was registered."""
        if self.core.identity.layout is None:
            raise LocalProtocolError("register memory first: a rank is known by its layout")
        return Endpoint(rank, self.address, self.incarnation, replace_fields(self.core.identity.layout, rank=rank))

    def speak_for(self, ranks: Sequence[Endpoint]) -> None:
        """Answer HELLO with a directory: pulls that were addressed to us go on to the ranks they need."""
        self.core.identity = replace(self.core.identity, directory=tuple(ranks))

    def belong_to(self, ranks: Sequence[KVLayout]) -> None:
        """Share the work of every pull with the other ranks of our instance (the layouts of all, ours among them), each
        of which pulls under the same tickets. Raises LocalProtocolError."""
        if self._pulls.planner is None:
            raise LocalProtocolError("register memory first: a rank is known by its layout")
        self._pulls.planner.join(ranks)

    def identify(self, model: str) -> None:
        """Name the model whose KV is exchanged; peers with another one are refused."""
        self.core.identity = replace(self.core.identity, model=model)

    def register(self, layers: Any, layout: KVLayout | None = None) -> None:
        """Register the KV cache: tensors or arrays per layer (see tensors.to_regions), or a list of Regions. Once.

        Without ``layout`` the blocks are plain bytes. Raises LocalProtocolError for unusable memory and
        TransportUnavailable when no transport can serve it. May block; meant for start-up.
        """
        self._check_open()
        if self._courier is not None:
            raise LocalProtocolError("memory is registered already; close this agent and make a new one")
        if layers is None or not len(layers):
            raise LocalProtocolError("no memory to register: give at least one tensor, array or Region")
        plain = isinstance(layers, list | tuple) and isinstance(layers[0], Region)
        regions = list(layers) if plain else to_regions(layers)
        grids = self._driver.grids = order_grids(regions)
        layout = layout or describe_grids(grids)
        check_layout(layout, grids)
        self._pulls.planner = Planner(grids, layout)
        self._read_only = next((str(region) for region in regions if not region.writable), "")
        self._driver.windows = Windows(regions)
        for region in regions:
            self._populator.submit(region.populate, lambda: not self._closing)
        self._courier = self._driver.courier = Courier(self.config, self.name, regions, self._loop, self._feed)
        self.core.identity = replace(
            self.core.identity,
            layout=layout,
            transports=self._courier.describe(),
        )

    # --- owner --------------------------------------------------------------------------------------------------------

    def lease(
        self,
        blocks: Sequence[int] | Sequence[Sequence[int]],
        *,
        readers: int = 1,
        tokens: int = 0,
        key: bytes = b"",
        seconds: float | None = None,
        growing: bool = False,
        capability: bytes = b"",
    ) -> Ticket:
        """Hold blocks (ids, or one list of ids per KV cache group) for readers and return the ticket they need.

        The blocks must not change until the lease has ended (``lease_ended``). A ``growing`` lease begins with none,
        and gets them by ``grow``; ``tokens`` and ``key`` say what it will hold. A ``capability`` of 16 secret bytes
        that the reader has from elsewhere lets it ``expect`` the lease. Raises LocalProtocolError.
        """
        groups = tuple(tuple(ids.tolist()) for ids in block_groups(blocks))
        check_count("tokens", tokens)
        check_bytes("key", key)
        self._last_lease += 1
        ticket = Ticket(
            address=self.address,
            incarnation=self.incarnation,
            lease=self._last_lease,
            epoch=1,
            capability=capability or secrets.token_bytes(CAPABILITY_BYTES),
            blocks=groups,
            tokens=tokens,
            key=key,
        )
        self.grant(ticket, readers=readers, seconds=seconds, growing=growing)
        return ticket

    def grant(self, ticket: Ticket, *, readers: int = 1, seconds: float | None = None, growing: bool = False) -> None:
        """Hold the blocks of a ticket whose number, epoch and capability the engine chose itself.

        Lease numbers must ascend. Raises LocalProtocolError."""
        self._check_open()
        ticket.check()
        check_seconds("a lease", seconds)
        check_count("readers", readers)
        check_bytes("capability", ticket.capability, CAPABILITY_BYTES)
        blocks = ticket.arrays()
        event = ev.Grant(
            ticket.lease,
            ticket.epoch,
            ticket.capability,
            self._pulls.leasable(blocks),
            readers,
            self.config.lease_seconds if seconds is None else seconds,
            max(seconds or 0, self.config.lease_cap_seconds),
            b"" if growing else ticket.terms(blocks),
            ev.Promise(ticket.tokens, ticket.key, len(blocks)),
            growing,
        )
        if ticket.lease in self._lease_ends:
            raise LocalProtocolError(f"lease {ticket.lease} is held already")
        # Before the grant: a request that came earlier than it may end the lease within.
        self._lease_ends[ticket.lease] = self._loop.create_future()
        try:
            self._driver.handle(event)
        except LocalProtocolError:
            del self._lease_ends[ticket.lease]
            raise

    def grow(self, ticket: Ticket, tokens: Sequence[int], *, complete: bool = False) -> None:
        """A growing lease now has the ticket's blocks, of which the first ``tokens[g]`` tokens of each group g are
        written and may be read; ``complete`` when these are all. Blocks are only added, tokens only rise. A lease that
        has ended stays so. Raises LocalProtocolError."""
        self._check_open()
        blocks, ready = ticket.arrays(), tuple(check_list("tokens", tokens))
        if len(ready) != len(blocks):
            raise LocalProtocolError(f"the lease has {len(blocks)} groups, {len(ready)} counts of tokens were given")
        for count in ready:
            check_count("tokens", count)
        self._driver.handle(
            ev.Grow(
                ticket.lease, self._pulls.leasable(blocks), ready, complete, ticket.terms(blocks) if complete else b""
            )
        )

    def end(self, lease: int, reason: str, *, again: bool = False) -> None:
        """Take leased blocks back: on return no verdict "held" can be given for them any more. ``again``: the same
        number will be granted under the next epoch, and whoever follows the lease waits for it."""
        self._feed(ev.End(lease, reason, again))

    def deny(self, capability: bytes, reason: str) -> None:
        """No lease will be granted under this capability: whoever expects it is told why."""
        self._feed(ev.Deny(capability, reason))

    def extend(self, lease: int) -> None:
        self._feed(ev.Extend(lease))

    async def lease_ended(self, ticket: Ticket) -> str:
        """Wait until the blocks are ours again; says why they are."""
        future = self._lease_ends.get(ticket.lease)
        return "it ended before" if future is None else await asyncio.shield(future)

    # --- reader -------------------------------------------------------------------------------------------------------

    def start_pull(
        self,
        ticket: Ticket,
        blocks: Sequence[int] | Sequence[Sequence[int]],
        *,
        skip_blocks: int = 0,
        partial: bool = False,
        tokens: Sequence[tuple[int, int]] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        by_layer: bool = False,
        follow: bool = False,
        on_end: Callable[[ev.TransferEnded], None] | None = None,
        on_part: Callable[[int], None] | None = None,
    ) -> int:
        """Start a pull and return its number. ``on_end`` is called exactly once, perhaps before the return; ``on_part``
        with the number of each part (layer) whose bytes may be used.

        ``blocks`` are destination ids (per group), for the ticket's blocks from ``skip_blocks`` on: all of them, or if
        ``partial`` as many as ids are given. With ``tokens``, a range (first, behind the last) per group, they are for
        these tokens instead, beginning with the block that holds the first: so the owner's block size may be another.
        A range that ends with the ticket's tokens is read to the end of its last block.

        ``follow`` reads under a growing lease (a ticket without blocks) what becomes ready, as it does: it needs
        ``tokens``, ``timeout`` is for each wait, ``on_part`` gets the token up to which the first group may be used,
        and should it fail, ``failed_blocks`` are those behind that.
        Raises LocalProtocolError for ids that do not fit."""
        planner = self._pulls.planner
        if planner is None:
            raise LocalProtocolError("register memory before pulling into it")
        check_count("skip_blocks", skip_blocks)
        check_seconds("a pull", timeout)
        if self._read_only:
            raise LocalProtocolError(f"{self._read_only} is registered read-only memory: nothing can be pulled into it")
        if follow and (tokens is None or by_layer):
            raise LocalProtocolError("a growing lease is followed by token ranges: give tokens, and not by_layer")
        source = ticket.arrays()
        demands = planner.demand(
            source, block_groups(blocks), skip_blocks=skip_blocks, partial=partial, tokens=tokens, held=ticket.tokens
        )
        timeout = self.config.transfer_timeout_seconds if timeout is None else timeout
        deadline = self._driver.clock() + timeout
        terms = b"" if follow else ticket.terms(source)
        order = Order(ticket, terms, demands, by_layer, priority, self.config.audit, timeout, deadline, follow)
        return self._pulls.start(order, on_end, on_part, self._driver.handle)

    def abort(self, number: int, reason: str = "aborted by the caller") -> None:
        """End a pull; its TransferEnded note follows once its destination is quiet. Late calls are harmless."""
        self._pulls.abort(number, reason)

    async def pull(
        self, ticket: Ticket, blocks: Sequence[int] | Sequence[Sequence[int]], **options: Any
    ) -> ev.TransferStats:
        """Read a ticket's blocks into ours (options as in ``start_pull``); on return they may be used.

        Raises TransferFailed (with ``failed_blocks`` and the cause), LocalProtocolError. When cancelled it returns only
        after the destination is quiet."""
        future: asyncio.Future[ev.TransferEnded] = self._loop.create_future()
        number = self.start_pull(ticket, blocks, on_end=future.set_result, **options)
        try:
            return stats_of(await asyncio.shield(future))
        except asyncio.CancelledError:
            self.abort(number, "the pull was cancelled")
            await patiently(future)
            raise

    async def pull_layers(
        self, ticket: Ticket, blocks: Sequence[int] | Sequence[Sequence[int]], **options: Any
    ) -> AsyncIterator[int]:
        """Like ``pull``, yielding the number of each layer as soon as its bytes may be used.

        A loop that may be left early belongs into ``async with contextlib.aclosing(agent.pull_layers(...)) as layers``:
        only its exit, or ``await layers.aclose()``, says that nothing is written any more."""
        queue: asyncio.Queue[int | ev.TransferEnded] = asyncio.Queue()
        over: asyncio.Future[ev.TransferEnded] = self._loop.create_future()

        def ended(note: ev.TransferEnded) -> None:
            over.set_result(note)
            queue.put_nowait(note)

        number = self.start_pull(ticket, blocks, by_layer=True, on_end=ended, on_part=queue.put_nowait, **options)
        item: int | ev.TransferEnded = -1
        try:
            while isinstance(item := await queue.get(), int):
                yield item
        finally:
            if isinstance(item, int):
                self.abort(number, "the caller stopped taking layers")
                await patiently(over)
                item = over.result()
        stats_of(item)

    def release(self, ticket: Ticket, *, whole: bool = False) -> None:
        """Tell the owner that this reader (``whole``: nobody) will read under the ticket."""
        self._feed(ev.Forgo(ticket, "" if whole else self.name))

    async def expect(self, address: str, capability: bytes, seconds: float | None = None) -> Ticket:
        """Wait for the lease that the agent at ``address`` grants under a capability: its ticket, without blocks.

        Raises PeerLost, saying why there is none."""
        future: asyncio.Future[ev.Promised] = self._loop.create_future()
        waiting = self._promises.setdefault((address, capability), [])
        waiting.append(future)
        try:
            self.start_expecting(address, capability, seconds)
            note = await future
        finally:
            waiting.remove(future)
            if not waiting:
                self._promises.pop((address, capability), None)
                self.disclaim(address, capability)
        if note.ticket is None:
            raise PeerLost(f"the agent at {address} leases nothing under this capability: {note.reason}")
        return note.ticket

    def start_expecting(self, address: str, capability: bytes, seconds: float | None = None) -> None:
        """As ``expect``; a Promised note has the answer. Raises LocalProtocolError."""
        self._check_open()
        check_bytes("capability", capability, CAPABILITY_BYTES)
        check_seconds("waiting for a lease", seconds)
        check_address(address)
        self._feed(ev.Expect(address, capability, self.config.transfer_timeout_seconds if seconds is None else seconds))

    def disclaim(self, address: str, capability: bytes, *, renounce: bool = False) -> None:
        """Expect it no more; ``renounce``: also tell the owner that nobody will read under it, now or later."""
        self._feed(ev.Disclaim(address, capability, renounce))

    def inform(self, address: str, message: Account | Saved) -> None:
        """Tell the agent at ``address``, whose listener gets an Informed note. Raises LocalProtocolError."""
        self._check_open()
        check_address(address)
        self._feed(ev.Inform(address, message))

    def keep(self, ticket: Ticket) -> None:
        """Renew a ticket's lease until ``drop``, a pull's end is up to the caller. TicketLost tells when it is over."""
        self._feed(ev.Keep(ticket, self.config.lease_cap_seconds))

    def drop(self, ticket: Ticket) -> None:
        self._feed(ev.Drop(ticket))

    # --- what is going on ---------------------------------------------------------------------------------------------

    def counters(self) -> Counter[str]:
        """Monotonic counts of everything that happened to this agent."""
        total = self.core.counters + self._side_channel.counters + self._driver.failures
        return total + self._courier.counters() if self._courier is not None else total

    def gauges(self) -> dict[str, int]:
        return self.core.gauges()

    def transport_reasons(self) -> dict[str, dict[str, str]]:
        """Per connected peer: why each other transport was not chosen."""
        return {} if self._courier is None else self._courier.reasons

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _on_frame(self, route: str, frame: bytes) -> None:
        self._feed(ev.Received(route, frame))

    def _on_lost(self, address: str, reason: str) -> None:
        self._feed(ev.Disconnected(address, reason))
        self._hangup_if_unused(address)

    def _hangup_if_unused(self, address: str) -> None:
        """Releases, renewals and questions are sent without a session; nobody else would ever hang up."""
        if address not in self.core.reader.dialer.sessions:
            self._side_channel.hangup(address)
            self._feed(ev.Disconnected(address, "nobody answers there"))

    def _note(self, note: ev.Note) -> None:
        match note:
            case ev.Met():
                self._pulls.met(note)
            case ev.TransferEnded():
                self._pulls.ended(note)
            case ev.BlocksReady():
                self._pulls.ready(note)
            case ev.PartConfirmed():
                self._pulls.confirmed(note)
            case ev.Promised(address, capability):
                for promised in self._promises.get((address, capability), ()):
                    if not promised.done():
                        promised.set_result(note)
            case ev.LeaseEnded(number, _, reason):
                future = self._lease_ends.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(reason)
            case ev.Drained():
                self._drained.set()
            case _:
                pass
        if self._on_note is not None:
            self._on_note(note)
