"""Courier: carries the core's data commands to the transports, and their completions back."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pd_connector.config import Config
from pd_connector.errors import TransportUnavailable
from pd_connector.memory import Region
from pd_connector.plan import Ids
from pd_connector.protocol import events as ev
from pd_connector.runtime.side_channel import advertised_host
from pd_connector.transport import registry
from pd_connector.transport.base import LeaseId, Status, Transport

logger = logging.getLogger(__name__)

_BATCH = 256  # completions taken per wake-up


@dataclass(slots=True)
class _Attempt:
    """A peer being connected: what it offers, over what we are at it now, and why other transports failed."""

    peer: str
    remote: dict[str, bytes]
    new_id: Callable[[], int]
    failed: dict[str, str]
    name: str = ""
    deadline: asyncio.TimerHandle | None = None

    def forget_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Courier:
    """Owns the transports of one agent. ``feed`` takes events for the core, on ``loop``."""

    def __init__(
        self,
        config: Config,
        agent: str,
        regions: Sequence[Region],
        loop: asyncio.AbstractEventLoop,
        feed: Callable[[ev.Event], None],
    ) -> None:
        self._loop = loop
        self._feed = feed
        self._connecting: dict[int, _Attempt] = {}
        self._peers: dict[str, str] = {}
        self.reasons: dict[str, dict[str, str]] = {}
        self._transports, missing = registry.start(config.transport, agent, transport_options(config), regions)
        missing |= self._register(regions, optional=config.transport == "auto")
        without = "; ".join(f"{name} is not: {why}" for name, why in missing.items())
        logger.info("transports %s are served%s", ", ".join(self._transports), f" ({without})" if without else "")
        for transport in self._transports.values():
            loop.add_reader(transport.fileno(), self._poll, transport)

    def _register(self, regions: Sequence[Region], *, optional: bool) -> dict[str, str]:
        """Why transports that were not asked for by name do without. Raises TransportUnavailable, all of them closed,
        when one that was asked for, or the last, cannot take the memory."""
        missing: dict[str, str] = {}
        try:
            for name, transport in list(self._transports.items()):
                try:
                    transport.register(regions)
                except TransportUnavailable as error:
                    if not optional or len(self._transports) == 1:
                        raise
                    logger.warning("transport %s is left out: %s", name, error.reason)
                    missing[name] = error.reason
                    del self._transports[name]
                    transport.close()
        except Exception:
            self.close()
            raise
        return missing

    def describe(self) -> dict[str, bytes]:
        return {name: transport.describe() for name, transport in self._transports.items()}

    def counters(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for name, transport in self._transports.items():
            counts: dict[str, int] = getattr(transport, "counters", dict)()
            total.update({f"{name}_{key}": value for key, value in counts.items()})
        return total

    def unwatch(self) -> None:
        """Take no completions any more. On the loop, before ``close``."""
        for attempt in self._connecting.values():
            attempt.forget_deadline()
        for transport in self._transports.values():
            self._loop.remove_reader(transport.fileno())

    def close(self) -> bool:
        """May block for the transports' own bounded time. On return nothing writes into our regions any more; False
        when something may."""
        quiet = True
        for transport in self._transports.values():
            try:
                transport.close()
                quiet &= not transport.abandoned
            except Exception:
                logger.exception("transport %s did not close", transport.name)
                quiet = False
        return quiet

    def carry_out(self, command: ev.Command, new_id: Callable[[], int]) -> None:
        match command:
            case ev.Connect(peer, remote):
                self._connect(_Attempt(peer, remote, new_id, {}))
            case ev.Disconnect(peer):
                name = self._peers.pop(peer, None)
                self.reasons.pop(peer, None)
                for tag in [tag for tag, entry in self._connecting.items() if entry.peer == peer]:
                    self._connecting.pop(tag).forget_deadline()
                if name is not None:
                    self._transports[name].disconnect(peer)
            case ev.PostRead():
                lease = LeaseId(command.number, command.epoch)
                args: tuple[Any, ...] = (command.peer, lease, command.capability, command.plan, command.tag)
                self._post(command.transport, command.tag, "post_read", *args, command.priority)
            case ev.Cancel(name, tag):
                self._transports[name].cancel(tag)
            case ev.Fence(peer, name, tag):
                self._post(name, tag, "fence", peer, tag)
            case ev.GrantBlocks(number, epoch, capability, blocks):
                self._grant(LeaseId(number, epoch), capability, blocks)
            case ev.RevokeBlocks(number, epoch):
                for transport in self._transports.values():
                    transport.revoke(LeaseId(number, epoch))
            case _:
                raise AssertionError(f"not a data command: {command}")

    def _grant(self, lease: LeaseId, capability: bytes, blocks: Mapping[int, Ids]) -> None:
        """A lease that cannot be served is ended: its reader is told, and its blocks come back."""
        arrays = {group: np.asarray(ids, np.uint32) for group, ids in blocks.items()}
        try:
            for transport in self._transports.values():
                transport.grant(lease, capability, arrays)
        except Exception as error:
            logger.exception("lease %d cannot be served", lease.number)
            self._feed(ev.End(lease.number, f"it cannot be served: {error}"))

    def _post(self, name: str, tag: int, method: str, *args: Any) -> None:
        """A call that ends in a completion; a refusal is one too."""
        try:
            getattr(self._transports[name], method)(*args)
        except Exception as error:  # of a user's transport too
            self._feed(ev.Completed(tag, Status.ERROR, f"{type(error).__name__}: {error}"))

    def _connect(self, attempt: _Attempt) -> None:
        """Over the best transport that did not fail yet; the peer is given up when none is left."""
        peer, tag = attempt.peer, attempt.new_id()
        usable = {name: transport for name, transport in self._transports.items() if name not in attempt.failed}
        try:
            name, reasons = registry.choose(usable, attempt.remote)
        except Exception as error:  # of a user's transport too
            failed = "; ".join(f"{name}: {why}" for name, why in attempt.failed.items())
            self._feed(ev.Connected(peer, error=failed or str(error)))
            return
        self.reasons[peer] = reasons = {**reasons, **attempt.failed}
        attempt.name = self._peers[peer] = name
        self._connecting[tag] = attempt
        if registry.after(name) in reasons.values():  # there is another one to go to
            attempt.deadline = self._loop.call_later(self._transports[name].attempt_s, self._too_slow, tag)
        others = "; ".join(f"{other}: {why}" for other, why in reasons.items())
        logger.info("peer %s is read over %s (%s)", peer, name, others or "no other transport here")
        try:
            self._transports[name].connect(peer, attempt.remote[name], tag)
        except Exception as error:
            del self._connecting[tag]
            self._try_next(attempt, str(error))

    def _too_slow(self, tag: int) -> None:
        attempt = self._connecting.pop(tag, None)
        if attempt is not None:
            self._try_next(attempt, f"no connection within {self._transports[attempt.name].attempt_s:g} s")

    def _try_next(self, attempt: _Attempt, why: str) -> None:
        attempt.forget_deadline()
        attempt.failed[attempt.name] = why
        if self._peers.pop(attempt.peer, None) is not None:
            self._transports[attempt.name].disconnect(attempt.peer)
        self._connect(attempt)

    def _poll(self, transport: Transport) -> None:
        for completion in transport.poll(_BATCH):
            entry = self._connecting.pop(completion.tag, None)
            if entry is None:
                self._feed(ev.Completed(completion.tag, completion.status, completion.detail))
                continue
            if completion.status is Status.DONE:
                entry.forget_deadline()
                self._feed(ev.Connected(entry.peer, transport=entry.name))
            else:
                self._try_next(entry, f"{completion.status} {completion.detail}")


def transport_options(config: Config) -> dict[str, dict[str, Any]]:
    """Options per transport: what the agent's own address implies, under what ``transport_options`` says."""
    local = {"cpus": list(config.io_cpus)}
    network = {"host": config.host, "advertise": advertised_host(config), **local}
    wires = ("cuda", "verbs", "hixl", "hccl", "tcp", "zmq", *registry.STAGED)
    implied: dict[str, dict[str, Any]] = {"shm": local} | dict.fromkeys(wires, network)
    given = config.transport_options
    return {name: implied.get(name, {}) | given.get(name, {}) for name in [*implied, *given]}
