"""Prefills whose decode instance reads along: which of their blocks are leased, and from which step they are ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from pd_connector.protocol.ticket import Ticket
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.metadata import Growth, StepOrders

PREEMPTED = "its request was preempted"


@dataclass
class Stream:
    """One request. ``ticket`` has the blocks that it had in the last step; before it was scheduled it has none."""

    request: Any
    ticket: Ticket
    granted: bool = False
    complete: bool = False
    over: bool = False
    """Its lease has ended for good: nobody reads."""
    blocks: list[list[int]] = field(default_factory=list)
    preemptions: int = 0


class Streams:
    """``block_tokens`` per KV cache group; those that are ``late`` are ready only when the whole prompt is computed,
    because their blocks are freed on the way. ``grant`` and ``end`` tell the agent that answers on the advertised
    port; the first also gives a lease its number."""

    def __init__(
        self,
        block_tokens: Sequence[int],
        late: Sequence[bool],
        grant: Callable[[str, Ticket], Ticket],
        end: Callable[[Ticket, str], None],
    ) -> None:
        self._block_tokens, self._late = tuple(block_tokens), tuple(late)
        self._grant, self._end = grant, end
        self._streams: dict[str, Stream] = {}

    def add(self, request: Any, ticket: Ticket) -> None:
        self._streams[request.request_id] = Stream(request, ticket, preemptions=request.num_preemptions)

    def get(self, request_id: str) -> Stream | None:
        return self._streams.get(request_id)

    def lost(self, lease: int) -> None:
        for stream in self._streams.values():
            stream.over = stream.over or stream.ticket.lease == lease

    def pop(self, request_id: str) -> Stream | None:
        return self._streams.pop(request_id, None)

    def step(self, output: Any, groups: Sequence[int], orders: StepOrders) -> None:
        """What a step does to the streams: epochs that end before it, leases that begin, blocks that it completes."""
        if not self._streams:
            return
        for stream in self._streams.values():
            if stream.request.num_preemptions != stream.preemptions:
                self._preempted(stream, orders)
        for new in output.scheduled_new_reqs:
            if (known := self._streams.get(new.req_id)) is not None:
                known.blocks = [list(new.block_ids[group]) for group in groups]
                self._scheduled(known, new.req_id, int(new.num_computed_tokens), output, orders)
        cached = output.scheduled_cached_reqs
        resumed = compat.resumed_requests(cached)
        for index, request_id in enumerate(cached.req_ids):
            if (known := self._streams.get(request_id)) is None:
                continue
            news = cached.new_block_ids[index] or ()
            if request_id in resumed:
                known.blocks = [list(news[group]) for group in groups]
            elif news:
                known.blocks = [mine + list(news[group]) for mine, group in zip(known.blocks, groups, strict=True)]
            self._scheduled(known, request_id, int(cached.num_computed_tokens[index]), output, orders)

    def _preempted(self, stream: Stream, orders: StepOrders) -> None:
        """vLLM has freed its blocks, and may give them away in this very step."""
        stream.preemptions = stream.request.num_preemptions
        stream.blocks, stream.complete = [], False
        if not stream.granted:
            return
        stream.granted = False
        ticket = stream.ticket
        orders.ends.append((ticket.lease, ticket.epoch, PREEMPTED, not stream.over))
        if not stream.over:
            self._end(ticket, PREEMPTED)
        stream.ticket = replace(ticket, epoch=ticket.epoch + 1, blocks=((),) * len(ticket.blocks))

    def _scheduled(self, stream: Stream, request_id: str, computed: int, output: Any, orders: StepOrders) -> None:
        if stream.over or stream.complete:
            return
        if not stream.granted:
            stream.granted = True
            stream.ticket = self._grant(request_id, stream.ticket)
            orders.grants.append((request_id, stream.ticket, True))
        # Also what was found in the prefix cache waits for the end of the step: vLLM puts blocks there when it
        # schedules them, and another request may write them in this very step.
        orders.computing.append(self._growth(stream, computed + int(output.num_scheduled_tokens[request_id])))

    def _growth(self, stream: Stream, computed: int) -> Growth:
        wanted = stream.ticket.tokens
        ready = min(computed, wanted)
        tokens = tuple(0 if late else ready for late in self._late)
        blocks = tuple(
            () if late else tuple(ids[: -(-wanted // size)])
            for ids, size, late in zip(stream.blocks, self._block_tokens, self._late, strict=True)
        )
        stream.complete = ready == wanted and not any(self._late)
        stream.ticket = replace(stream.ticket, blocks=blocks)
        return Growth(stream.ticket, tokens, stream.complete)
