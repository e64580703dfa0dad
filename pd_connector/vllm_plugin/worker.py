"""Worker side: one agent per rank in a portal; the engine's thread only hands over orders and takes results."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pd_connector.errors import LocalProtocolError, PDError, TransferFailed
from pd_connector.protocol import events as ev
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.clock import stamp
from pd_connector.runtime.portal import Portal
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.device_order import DeviceOrder
from pd_connector.vllm_plugin.identity import describe_caches, model_identity
from pd_connector.vllm_plugin.metadata import Growth, Handshake, Load, Save, StepOrders
from pd_connector.vllm_plugin.metrics import LOOK_SECONDS, PDStats, Transferred
from pd_connector.vllm_plugin.settings import worker_config
from pd_connector.vllm_plugin.turn_pool import TurnPool

logger = logging.getLogger(__name__)

_ORDER_SECONDS = 30.0
"""How long the engine waits for an end of leases to be applied; the portal answers in milliseconds unless starved."""

_IDLE_SECONDS = 0.005
"""Longest wait in a step that computes nothing: also the longest that it delays a request which arrives meanwhile."""
_CROWDED_IDLE_SECONDS = 0.02
"""The same where our I/O threads and the engine's have one core together: its idle steps would take a fifth of what
moves blocks. Measured with one core: 93 ms for 235 MB with waits of 5 ms, 83 with 20 (docs/adr/0006)."""


@dataclass
class Finished:
    """Results since the last step. Each request is in ``sent`` or ``received`` exactly once in its life."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    """Received ones that are to be computed as a whole instead."""


@dataclass(frozen=True)
class _Ended:
    """A lease's end, or with ``blocks`` (destinations per group) that of a load."""

    request_id: str
    blocks: tuple[list[int], ...] | None = None
    failed: bool = False


@dataclass
class _Lease:
    """``open``: its request still runs, so nobody waits for the lease's end."""

    request_id: str
    epoch: int
    open: bool
    saving: bool = False
    """Its blocks are being copied to the host pool: they are the engine's when both is over."""
    ended: bool = False


def idle_seconds(engine: Set[int], ours: Set[int]) -> float:
    """How long an idle step may wait, if the engine's thread and our I/O threads run on these CPUs."""
    return _CROWDED_IDLE_SECONDS if len(engine) == 1 and ours == engine else _IDLE_SECONDS


class PDWorker:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = worker_config(vllm_config)
        self._portal: Portal | None = None
        self._order = DeviceOrder(())
        self._agent: Agent | None = None
        self._rank = 0
        self._groups = len(kv_cache_config.kv_cache_groups)
        # Written on the portal's loop, drained by the engine's thread; deque operations are atomic.
        self._ended: deque[_Ended] = deque()
        self._transferred: deque[Transferred] = deque()
        self._wake = threading.Event()
        self._idle, self._idle_seconds = False, _IDLE_SECONDS
        self._pool: TurnPool | None = None
        self._saving: dict[int, int] = {}
        self._saves: deque[tuple[int, bool]] = deque()
        self._forwards: list[tuple[str, int]] = []
        self._numbers: dict[str, int] = {}
        self._waiting = False
        self._leases: dict[int, _Lease] = {}
        self._failed_blocks: set[int] = set()
        self._next_look = 0.0
        self._seen: tuple[Counter[str], dict[str, int]] = (Counter(), {})
        self._now: tuple[Counter[str], dict[str, int]] = (Counter(), {})

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        compat.request_amx_permission()
        rank = compat.parallel_rank()
        regions, layout = describe_caches(self._vllm_config, self._kv_cache_config, kv_caches, rank)
        self._rank = layout.rank
        engine_id = self._vllm_config.kv_transfer_config.engine_id
        self._portal = Portal(f"pdc-worker-{self._rank}", self._config.io_cpus)
        self._idle_seconds = idle_seconds(os.sched_getaffinity(0), self._portal.call(os.sched_getaffinity, 0))
        self._order = DeviceOrder(regions)
        self._agent = Agent(self._config, name=f"{engine_id}/{self._rank}", on_note=self._note)
        self._agent.identify(self._config.model or model_identity(self._vllm_config.model_config))
        self._portal.call(self._agent.start)
        self._portal.call(self._agent.register, regions, layout, timeout=60)
        if self._config.pool_bytes:
            name, model = f"{engine_id}/{self._rank}/pool", self._agent.core.identity.model
            self._pool = TurnPool(self._config, name, model, regions, layout, self._saved)
            self._portal.call(self._pool.start, timeout=60)
        size = sum(region.length for region in regions)
        logger.info(
            "PDConnector: rank %d registered %d bytes in %d regions, layout %s (%s), transports %s",
            self._rank, size, len(regions), layout.fingerprint(), layout.platform, ", ".join(self._agent.transports),
        )  # fmt: skip

    def handshake(self) -> Handshake | None:
        if self._agent is None:
            return None
        me = self._agent.endpoint(self._rank)
        pool = None if self._pool is None else self._pool.handshake()
        return Handshake(me.address, me.incarnation, me.layout, pool)

    # --- orders -------------------------------------------------------------------------------------------------------

    def apply(self, orders: StepOrders) -> None:
        """Hand a step's orders over. Ends are applied before the return: this step may overwrite those blocks."""
        if self._portal is None or self._agent is None:
            return
        self._idle = orders.idle
        if orders.instance:
            self._portal.call(self._agent.belong_to, orders.instance)
        if orders.ends:
            # At once: growths that still wait for the device come late then, and grants never wait behind their end.
            self._portal.call(self._end, orders.ends, timeout=_ORDER_SECONDS)
        if orders.pool_ends and self._pool is not None:
            self._portal.call(self._pool.end, orders.pool_ends, timeout=_ORDER_SECONDS)
        o = orders
        if any((o.grants, o.saves, o.ready, o.closes, o.drops, o.extends)):
            self._portal.post(self._carry_out, orders)
        if o.loads or o.aborts:
            self._order.after(partial(self._portal.post, self._start_loads, orders), anyway=True)
        self._waiting = orders.waiting

    def computed(self, orders: StepOrders) -> None:
        """The step's forward was launched: what it computes may be read once the device is done."""
        if orders.completes:
            now = stamp()
            self._forwards += [(request_id, now) for request_id in orders.completes]
        if orders.computing and self._portal is not None:
            self._order.after(partial(self._portal.post, self._grow, orders.computing))

    def _end(self, ends: list[tuple[int, int, str, bool]]) -> None:
        assert self._agent is not None
        for number, epoch, reason, again in ends:
            if number in self._leases and self._leases[number].epoch == epoch:
                self._agent.end(number, reason, again=again)

    def _carry_out(self, orders: StepOrders) -> None:
        assert self._agent is not None
        for request_id, ticket, grows in orders.grants:
            self._grant(request_id, ticket, grows)
        for save in orders.saves:
            self._save(save)
        # A release may overtake its grant: then its end was applied, to nothing, before this.
        self._end(orders.ends)
        self._grow(orders.ready)
        for number in orders.closes:
            self._close(number)
        for number in orders.drops:
            self._leases.pop(number, None)
        for number in orders.extends:
            self._agent.extend(number)

    def _start_loads(self, orders: StepOrders) -> None:
        """No kernel touches their blocks any more: of a request that had them before, say."""
        assert self._agent is not None
        for load in orders.loads:
            self._load(load)
        for request_id in orders.aborts:
            if (transfer := self._numbers.get(request_id)) is not None:
                self._agent.abort(transfer, "the request was aborted")

    def _grant(self, request_id: str, ticket: Ticket, grows: bool) -> None:
        assert self._agent is not None
        self._leases[ticket.lease] = _Lease(request_id, ticket.epoch, grows)
        try:
            self._agent.grant(ticket, growing=grows)
        except LocalProtocolError as error:
            logger.warning("request %s cannot be handed over: %s", request_id, error)
            self._lease_ended(ticket.lease)

    def _save(self, save: Save) -> None:
        assert self._agent is not None
        lease, number = self._leases.get(save.source.lease), save.target.lease
        if lease is None or self._pool is None:
            self._saves.append((number, False))
            return
        lease.saving = True
        self._saving[number] = save.source.lease
        self._pool.save(save, self._agent)

    def _saved(self, number: int, done: bool) -> None:
        assert self._agent is not None
        source = self._saving.pop(number)
        self._saves.append((number, done))
        self._leases[source].saving = False
        if self._leases[source].ended:
            self._lease_ended(source)
        else:
            self._agent.end(source, "it was not copied")

    def _grow(self, growths: list[Growth]) -> None:
        assert self._agent is not None
        for growth in growths:
            lease = self._leases.get(growth.ticket.lease)
            if lease is None or lease.ended or lease.epoch != growth.ticket.epoch:
                continue  # it has ended meanwhile
            try:
                self._agent.grow(growth.ticket, growth.tokens, complete=growth.complete)
            except LocalProtocolError as error:
                self._agent.end(growth.ticket.lease, str(error))

    def _close(self, number: int) -> None:
        """The request has ended: from now on the lease alone keeps its blocks."""
        lease = self._leases.get(number)
        if lease is not None:
            lease.open = False
            if lease.ended:
                self._lease_ended(number)

    def _lease_ended(self, number: int) -> None:
        lease = self._leases.get(number)
        if lease is None:
            return
        lease.ended = True
        if not lease.open and not lease.saving:
            del self._leases[number]
            self._look()
            self._ended.append(_Ended(lease.request_id))
            self._wake.set()

    def _load(self, load: Load) -> None:
        agent = self._agent
        assert agent is not None

        over = False

        def ended(note: ev.TransferEnded) -> None:
            nonlocal over
            over = True
            self._numbers.pop(load.request_id, None)
            error = type(note.error).__name__ if note.error is not None else ""
            if note.outcome in ("failed", "abandoned"):
                level = logging.INFO if load.prefix else logging.WARNING
                logger.log(level, "request %s: load failed: %s", load.request_id, note.error)
            if note.outcome != "done" and load.ticket is not None:
                # No rank will use what it reads under this ticket, and a pull that got no connection told nobody.
                if load.follow:  # under whatever epoch it is by now
                    agent.disclaim(load.ticket.address, load.ticket.capability, renounce=True)
                else:
                    agent.release(load.ticket, whole=True)
            self._look()
            # First of all, since the step that reports the end may be the last one for long.
            address = "" if load.ticket is None else load.ticket.address
            self._transferred.append(Transferred(note.stats, note.outcome, error, address, load.request_id, stamp()))
            if note.outcome == "abandoned":
                return  # of blocks that a device may still write to the engine never hears again
            # Of an aborted request nothing may be said but that it is quiet: its blocks may be another's by now.
            # A stream that broke off leaves what is confirmed of it.
            blocks = ([*note.failed_blocks],) if load.follow and self._groups == 1 else load.block_ids
            self._ended.append(_Ended(load.request_id, blocks, failed=note.outcome == "failed"))
            self._wake.set()

        try:
            if load.problem or load.ticket is None:
                raise TransferFailed(load.problem)
            number = agent.start_pull(load.ticket, load.block_ids, tokens=load.tokens, follow=load.follow, on_end=ended)
        except Exception as error:  # an engine that is never told waits for ever
            if not over:
                cause = error if isinstance(error, PDError) else TransferFailed(f"{type(error).__name__}: {error}")
                ended(ev.TransferEnded(0, "failed", cause, tuple(load.block_ids[0])))
            return
        if not over:
            self._numbers[load.request_id] = number

    def _note(self, note: ev.Note) -> None:
        if isinstance(note, ev.LeaseEnded):
            self._lease_ended(note.number)

    def _look(self) -> None:
        """On the loop: what the agent counts changes there, another thread must not iterate over it. Looking before a
        result is handed over makes the last step's gauges true for the idle time that follows."""
        assert self._agent is not None
        self._now = (self._agent.counters(), self._agent.gauges())

    # --- results ------------------------------------------------------------------------------------------------------

    def finished(self) -> Finished:
        """What ended since the last call. In an idle step it waits a moment for something to end: an engine that waits
        for transfers steps over and over with nothing to compute, and takes the CPU from the very threads it waits for.
        """
        if self._idle and not self._ended and (self._numbers or self._leases or self._waiting):
            self._wake.clear()
            if not self._ended:
                self._wake.wait(self._idle_seconds)
        out = Finished()
        while self._ended:
            end = self._ended.popleft()
            (out.sent if end.blocks is None else out.received).add(end.request_id)
            if not end.failed or end.blocks is None:
                continue
            # Ids of blocks name them within their group: with several groups vLLM is told of the request instead.
            if self._groups == 1:
                self._failed_blocks.update(end.blocks[0])
            else:
                out.failed.add(end.request_id)
        return out

    def take_failed_blocks(self) -> set[int]:
        """Blocks of the requests that the last ``finished`` reported as received, but failed."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def stats(self) -> PDStats | None:
        """What changed since the last call, or None."""
        if self._portal is None:
            return None
        counters, gauges = self._now
        delta = counters - self._seen[0]
        transfers = [self._transferred.popleft() for _ in range(len(self._transferred))]
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._portal.post(self._look)
        forwards, self._forwards = self._forwards, []
        saves = [self._saves.popleft() for _ in range(len(self._saves))]
        if not delta and not transfers and not forwards and not saves and gauges == self._seen[1]:
            return None
        self._seen = (counters, gauges)
        return PDStats.of(
            counters=delta, transfers=transfers, gauges={str(self._rank): gauges}, forwards=forwards, saves=saves
        )

    def shutdown(self) -> None:
        """Let readers of our leases finish, within ``drain_seconds``, then close."""
        if self._portal is None or self._agent is None:
            return
        self._order.close()
        try:
            self._portal.run(self._agent.drain(), timeout=self._config.drain_seconds + 5)
            self._portal.run(self._agent.close(), timeout=30)
            if self._pool is not None:
                self._portal.run(self._pool.agent.close(), timeout=30)
        finally:
            self._portal.close()
            self._portal = None
