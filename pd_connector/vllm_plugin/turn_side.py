"""Scheduler side of conversations: which finished requests are kept in the host pool, and who is told."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.v1.request import RequestStatus

from pd_connector.cache.slots import Slots
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import CAPABILITY_BYTES, MAX_SAVED, Endpoint, Saved
from pd_connector.protocol.params import report_of, wants_save
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.agent import Agent
from pd_connector.vllm_plugin.metadata import PoolHandshake, Save
from pd_connector.vllm_plugin.side import Side

logger = logging.getLogger(__name__)

_MARKS = 32
"""Prefixes of which a ticket has keys, so that a next turn which differs somewhere loses little of what is before."""


@dataclass
class _Turn:
    """``missing`` ranks have not said yet whether they have it."""

    request_id: str
    ticket: Ticket
    to: tuple[str, bytes]
    missing: int
    until: float
    """When the leases on the pools end, on the monotonic clock."""
    complete: bool = True


class TurnSide:
    """Speaks for the pools of all ranks, at an address of its own. ``new_lease`` numbers a lease of the KV cache."""

    def __init__(self, side: Side, new_lease: Callable[[], int]) -> None:
        self._side, self._new_lease = side, new_lease
        self._turns: dict[int, _Turn] = {}
        self._notes: deque[ev.Note] = deque()
        self._slots = Slots(0)
        self._pools: tuple[PoolHandshake, ...] = ()
        self._last = 0
        self._agent: Agent | None = None

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._slots.used

    def set_pools(self, pools: Sequence[PoolHandshake]) -> None:
        """The pools of all ranks, in order; none when nothing is to be kept."""
        if not pools:
            return
        if any(self._side.late):
            logger.warning("pool_bytes is of no use here: this model has windows or states, whose turns are not kept")
        self._slots = Slots(min(pool.slots for pool in pools))
        self._pools = tuple(pools)
        config = msgspec.structs.replace(self._side.config, port=0)
        self._agent = Agent(config, name=f"{self._side.engine_id}/pool", on_note=self._note)
        self._agent.identify(self._side.model)
        self._side.portal.call(self._agent.start)
        ranks = [Endpoint(number, pool.address, pool.incarnation, pool.layout) for number, pool in enumerate(pools)]
        self._side.portal.call(self._agent.speak_for, ranks)
        words = "PDConnector: keeps finished requests in %d slots, to be read at %s"
        logger.info(words, self._slots.count, self._agent.address)

    def _note(self, note: ev.Note) -> None:
        """On the portal's thread, also while the engine stands still: nothing that strangers may send is kept."""
        if isinstance(note, ev.LeaseEnded):
            self._notes.append(note)

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> bool:
        """A request ended: keep it, if somebody asked for that; whether its blocks are still needed."""
        params = request.kv_transfer_params or {}
        to = report_of(params) if wants_save(params) else None
        if to is None:
            return False
        why = self._begin(request, block_ids, to)
        if why:
            self._side.counters["turns_not_kept"] += 1
            self._tell(to, Saved(src=0, dst=0, of=to[1], reason=why))
        return not why

    def _begin(self, request: Any, block_ids: Sequence[Sequence[int]], to: tuple[str, bytes]) -> str:
        """Order its copy; why not, if not."""
        if self._agent is None:
            return "pool_bytes is 0 here"
        if request.status not in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED):
            return "the request did not finish"
        if any(self._side.late):
            return "windows and states cannot be continued by another instance"
        # The token sampled last has not been computed.
        tokens = min(int(request.num_computed_tokens), len(request.all_token_ids) - 1)
        if request.prompt_token_ids is None or tokens < 1 or not any(block_ids):
            return "it has no tokens of its own"
        sizes = self._side.block_tokens
        blocks = tuple(
            tuple(block_ids[group][: -(-tokens // size)]) for group, size in zip(self._side.groups, sizes, strict=True)
        )
        self._last += 1
        taken = self._slots.take(self._last, max(map(len, blocks)))
        if taken is None:
            wanted, there = max(map(len, blocks)), self._slots.count
            busy = "others are just being copied" if wanted <= there else "pool_bytes is too small"
            return f"it needs {wanted} slots of {there}, {busy}"
        slots, gone = taken
        for number in gone:
            self._forget(number, "newer turns needed the room")
        source = Ticket(
            address=self._side.agent.address,
            incarnation=self._side.agent.incarnation,
            lease=self._new_lease(),
            epoch=1,
            capability=secrets.token_bytes(CAPABILITY_BYTES),
            blocks=blocks,
            tokens=tokens,
        )
        target = self._target(request, tokens, tuple(tuple(slots[: len(ids)]) for ids in blocks))
        until = time.monotonic() + self._side.config.pool_seconds
        self._turns[target.lease] = _Turn(request.request_id, target, to, len(self._pools), until)
        self._side.orders.grants.append((request.request_id, source, False))
        self._side.orders.saves.append(Save(source, target))
        self._side.portal.post(self._lease_here, target)
        return ""

    def _target(self, request: Any, tokens: int, slots: tuple[tuple[int, ...], ...]) -> Ticket:
        assert self._agent is not None
        step = max(self._side.block_tokens)
        step *= max(-(-tokens // (step * _MARKS)), 1)
        counts = [*range(step, tokens, step), tokens]
        keys = self._side.keys(request, request.all_token_ids, counts)
        return Ticket(
            address=self._agent.address,
            incarnation=self._agent.incarnation,
            lease=self._last,
            epoch=1,
            capability=secrets.token_bytes(CAPABILITY_BYTES),
            blocks=slots,
            tokens=tokens,
            key=keys[-1],
            marks=tuple(zip(counts[:-1], keys[:-1], strict=True)),
        )

    def _lease_here(self, ticket: Ticket) -> None:
        """So that this address answers RENEW and RELEASE."""
        assert self._agent is not None
        self._agent.grant(ticket, seconds=self._side.config.pool_seconds)

    def saved(self, number: int, done: bool) -> None:
        """One rank's copy has ended."""
        if (turn := self._turns.get(number)) is None:
            return  # given up meanwhile
        turn.missing -= 1
        turn.complete = turn.complete and done
        if not turn.missing:
            self._copied(number, turn)

    def ended(self, request_ids: set[str]) -> None:
        """No rank needs these requests' blocks any more, so their copies have ended, told of or not."""
        for number, turn in list(self._turns.items()):
            if turn.missing and turn.request_id in request_ids:
                turn.missing, turn.complete = 0, False
                self._copied(number, turn)

    def _copied(self, number: int, turn: _Turn) -> None:
        told = turn.ticket.to_bytes()
        turn.complete = turn.complete and len(told) <= MAX_SAVED
        wanted = self._slots.filled(number)
        if wanted and not turn.complete:
            self._slots.drop(number)
        if not wanted or not turn.complete:
            self._forget(number, "it could not be filled")
            self._tell(turn.to, Saved(src=0, dst=0, of=turn.to[1], reason="it could not be copied"))
            return
        self._side.counters["turns_kept"] += 1
        remaining = max(int(1e3 * (turn.until - time.monotonic())), 0)
        self._tell(turn.to, Saved(src=0, dst=0, of=turn.to[1], ticket=told, remaining_ms=remaining))

    def take_notes(self) -> None:
        while self._notes:
            note = self._notes.popleft()
            if isinstance(note, ev.LeaseEnded) and self._slots.drop(note.number):
                self._forget(note.number, note.reason)

    def forget_all(self, reason: str) -> None:
        """Also when no step follows that would tell the workers: their pools' agents are asked as readers would."""
        for number, turn in list(self._turns.items()):
            if self._slots.drop(number):
                self._forget(number, reason)
                self._side.portal.post(self._release, turn.ticket)

    def _release(self, ticket: Ticket) -> None:
        assert self._agent is not None
        for rank in self._pools:
            there = msgspec.structs.replace(ticket, address=rank.address, incarnation=rank.incarnation)
            self._agent.release(there, whole=True)

    def _forget(self, number: int, reason: str) -> None:
        """Nobody may read it any more. One that is being filled stays known until its last rank is done."""
        assert self._agent is not None
        self._side.orders.pool_ends.append((number, reason))
        self._side.portal.post(self._agent.end, number, reason)
        if not self._turns[number].missing:
            del self._turns[number]

    def _tell(self, to: tuple[str, bytes], message: Saved) -> None:
        self._side.portal.post(self._side.agent.inform, to[0], message)

    def close(self) -> None:
        if self._agent is not None:
            self._side.portal.run(self._agent.close(), timeout=10)
