"""Prefill side of the scheduler: which blocks are leased for whom, and when they are the engine's again."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace
from vllm.v1.request import RequestStatus

from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import CAPABILITY_BYTES
from pd_connector.protocol.params import to_params, transfer_of
from pd_connector.protocol.ticket import Ticket
from pd_connector.vllm_plugin.metadata import Growth
from pd_connector.vllm_plugin.side import STATES, Side, state_blocks
from pd_connector.vllm_plugin.streams import PREEMPTED, Stream, Streams

logger = logging.getLogger(__name__)

_EXPIRED = "it expired"
"""Reason of an expired lease. Ours may expire while a reader still renews the workers' at the workers."""


class PrefillSide:
    """``sizes``: tensor, pipeline and data parallel size, told to routers."""

    def __init__(self, side: Side, sizes: tuple[int, int, int]) -> None:
        self._side = side
        self._sizes = sizes
        self._streams = Streams(side.block_tokens, side.late, self._grant_stream, self._end_stream)
        self._shortened: set[str] = set()
        self._leases: dict[int, str] = {}
        self._lease_of: dict[str, int] = {}
        self._last_lease = 0

    def __len__(self) -> int:
        """Leases, and whatever else is remembered of requests."""
        return len(self._leases) + len(self._lease_of) + len(self._shortened)

    def arrived(self, request: Any) -> None:
        if not (request.kv_transfer_params or {}).get("do_remote_decode"):
            return
        if self._side.shortens and _shorten(request):
            self._shortened.add(request.request_id)
        self._begin_stream(request)

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended: lease its blocks if it was a prefill for somebody else. (delay the free?, ticket)."""
        delay, ticket = self._finished(request, block_ids)
        stream = self._streams.pop(request.request_id)
        if stream is not None and not delay:
            self._drop_stream(stream)
        return delay, ticket

    def _finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        shortened = request.request_id in self._shortened
        self._shortened.discard(request.request_id)
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return False, None
        if not self._side.produces:
            self._keep_back(request, "wrong_role", "kv_role kv_consumer hands nothing over; use kv_producer or kv_both")
            return False, None
        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        if not done or not any(block_ids) or not tokens or request.prompt_token_ids is None:
            return False, None
        if self._side.shortens and not shortened:
            self._keep_back(
                request, "states_not_handed_over", "its prompt, of embeddings or one token, has no last token less"
            )
            return False, None
        blocks = tuple(
            tuple(state_blocks(block_ids[group]) if state else block_ids[group][: -(-tokens // size)])
            for group, size, state in zip(self._side.groups, self._side.block_tokens, self._side.states, strict=True)
        )
        if any(state and len(ids) != 1 for state, ids in zip(self._side.states, blocks, strict=True)):
            self._keep_back(request, "states_not_handed_over", STATES)
            return False, None
        stream = self._streams.get(request.request_id)
        if stream is not None and stream.over:
            return False, None
        if stream is not None and stream.granted:
            ticket = self._close_stream(stream, blocks)
        else:
            ticket = self._number(self._new_ticket(request, tokens, blocks))
            self._side.orders.grants.append((request.request_id, ticket, False))
            self._side.portal.post(self._grant_here, ticket)
        self._leases[ticket.lease] = request.request_id
        self._lease_of[request.request_id] = ticket.lease
        return True, to_params(
            ticket,
            request_id=request.request_id,
            engine_id=self._side.engine_id,
            tp_size=self._sizes[0],
            pp_size=self._sizes[1],
            engines=self._sizes[2],
        )

    def new_lease(self) -> int:
        """A number for what is granted right afterwards: they ascend in that order."""
        self._last_lease += 1
        return self._last_lease

    def _number(self, ticket: Ticket) -> Ticket:
        return replace(ticket, lease=self.new_lease())

    def _new_ticket(self, request: Any, tokens: int, blocks: tuple[tuple[int, ...], ...]) -> Ticket:
        """Under the capability that the broker chose, or a new one; it has no number yet."""
        chosen = transfer_of(request.kv_transfer_params)
        return Ticket(
            address=self._side.agent.address,
            incarnation=self._side.agent.incarnation,
            lease=0,
            epoch=1,
            capability=chosen[0] if chosen is not None else secrets.token_bytes(CAPABILITY_BYTES),
            blocks=blocks,
            tokens=tokens,
            key=self._side.key(request, tokens),
        )

    def _keep_back(self, request: Any, counter: str, why: str) -> None:
        self._side.counters[counter] += 1
        logger.warning("request %s is not handed over: %s", request.request_id, why)

    def _grant_here(self, ticket: Ticket, grows: bool = False) -> None:
        """A lease of the same number on the advertised agent, so that it answers RENEW and RELEASE. It lasts as long as
        the workers' own, because its answers tell the reader how often to renew; those decide when one expires."""
        self._side.agent.grant(ticket, growing=grows)

    def scheduled(self, output: Any) -> None:
        self._streams.step(output, self._side.groups, self._side.orders)

    def ended(self, request_ids: set[str]) -> None:
        """Every worker has ended these requests' leases: their blocks are free."""
        for request_id in request_ids:
            if (number := self._lease_of.pop(request_id, None)) is not None:
                del self._leases[number]
                self._side.portal.post(self._side.agent.end, number, "every worker ended it")

    def noted(self, note: ev.Note) -> None:
        match note:
            case ev.LeaseEnded(number, epoch, reason) if number in self._leases and reason not in (_EXPIRED, PREEMPTED):
                self._side.orders.ends.append((number, epoch, reason, False))
                self._streams.lost(number)
            case ev.LeaseRenewed(number, _) if number in self._leases:
                self._side.orders.extends.append(number)
            case _:
                pass

    # --- prefills that are read along ---------------------------------------------------------------------------------

    def _begin_stream(self, request: Any) -> None:
        chosen = transfer_of(request.kv_transfer_params)
        if chosen is None or not chosen[1]:
            return
        serves = self._side.produces and request.prompt_token_ids is not None
        if not serves or self._side.shortens > (request.request_id in self._shortened):
            self._side.portal.post(self._side.agent.deny, chosen[0], "this instance cannot hand its prefill over")
            return
        ticket = self._new_ticket(request, request.num_prompt_tokens, ((),) * len(self._side.groups))
        self._streams.add(request, ticket)

    def _grant_stream(self, request_id: str, ticket: Ticket) -> Ticket:
        ticket = ticket if ticket.lease else self._number(ticket)
        self._leases[ticket.lease] = request_id
        self._side.portal.post(self._grant_here, ticket, True)
        return ticket

    def _end_stream(self, ticket: Ticket, reason: str) -> None:
        self._side.portal.post(partial(self._side.agent.end, ticket.lease, reason, again=True))

    def _close_stream(self, stream: Stream, blocks: tuple[tuple[int, ...], ...]) -> Ticket:
        """Its request is done: whatever was not ready before is, and the blocks are free when the lease ends."""
        ticket = stream.ticket = replace(stream.ticket, blocks=blocks)
        if not stream.complete:
            sizes = [1 if state else stream.ticket.tokens for state in self._side.states]
            self._side.orders.ready.append(Growth(ticket, tuple(sizes), True))
        self._side.orders.closes.append(ticket.lease)
        return ticket

    def _drop_stream(self, stream: Stream) -> None:
        """Its request was aborted, or nobody reads: the blocks are free at once."""
        reason, ticket = "its request ended before its prompt was computed", stream.ticket
        self._side.portal.post(self._side.agent.deny, ticket.capability, reason)
        if not ticket.lease:
            return  # it was never scheduled
        # Of a preempted one the last epoch has ended, and those who wait for the next one have to be told.
        self._side.orders.ends.append((ticket.lease, ticket.epoch - (not stream.granted), reason, False))
        self._side.orders.drops.append(ticket.lease)
        self._leases.pop(ticket.lease, None)
        self._side.portal.post(self._side.agent.end, ticket.lease, reason)


def _shorten(request: Any) -> bool:
    """Take the last prompt token from a prefill that is for somebody else. The decode instance computes it in any case:
    it needs the state before it, and the window before it, of which one that has moved on may lack the first token."""
    tokens = request.prompt_token_ids
    if tokens is None or len(tokens) < 2 or request.num_tokens != len(tokens):
        return False
    request.prompt_token_ids = tokens[:-1]
    del request._all_token_ids[-1]
    request.num_prompt_tokens -= 1
    return True
