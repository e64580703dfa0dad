"""Decode side of the scheduler: which prompts are loaded instead of computed, by which ticket, after which wait."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol.params import from_params, prefix_of, stream_of
from pd_connector.protocol.ticket import Ticket
from pd_connector.vllm_plugin.metadata import Load
from pd_connector.vllm_plugin.side import STATES, Side, state_blocks

logger = logging.getLogger(__name__)

_LOADS_NOTHING = "kv_role kv_producer loads nothing; use kv_consumer or kv_both"


@dataclass
class Hope:
    """A request that may load its prompt's KV: the one attempt it has. ``problem`` says why its ticket, if it has one,
    cannot serve; otherwise ``tokens`` of it do. A decode request that was sent along with its prefill has a ``stream``
    (address, capability) instead, and ``waits`` until that is scheduled and there is a ticket. A prefill may have the
    ticket of a ``prefix``, from the conversation's last turn."""

    ticket: Ticket | None = None
    tokens: int = 0
    prefix: bool = False
    stream: tuple[str, bytes] | None = None
    waits: bool = False
    promised: ev.Promised | None = None
    problem: str = ""
    attempted: bool = False
    loading: bool = False


class DecodeSide:
    def __init__(self, side: Side) -> None:
        self._side = side
        self._hopes: dict[str, Hope] = {}
        self._lost: set[bytes] = set()

    def __len__(self) -> int:
        """Requests that were handed over and have not ended."""
        return len(self._hopes)

    @property
    def waits(self) -> bool:
        """Whether a request waits for its prefill to be scheduled."""
        return any(hope.waits for hope in self._hopes.values())

    def arrived(self, request: Any) -> None:
        """Keep the ticket's lease alive while the request waits in the queue."""
        hope = self._hope(request)
        if hope is not None and hope.ticket is not None and not hope.problem:
            self._side.portal.post(self._side.agent.keep, hope.ticket)

    def _hope(self, request: Any) -> Hope | None:
        """What a request may load, looked at once; None when it was not handed over."""
        params = request.kv_transfer_params
        if not params or not (params.get("do_remote_prefill") or params.get("do_remote_decode")):
            return None
        if (known := self._hopes.get(request.request_id)) is not None:
            return known
        if not params.get("do_remote_prefill"):
            return self._prefix_hope(request, params)
        hope = self._hopes[request.request_id] = Hope(stream=stream_of(params))
        if hope.stream is not None:
            hope.waits = self._side.consumes
            if hope.waits:
                self._expect(hope.stream)
            else:
                self._forgo(hope.stream)
                self._decline(request, hope, "wrong_role", _LOADS_NOTHING)
            return hope
        try:
            hope.ticket = from_params(params)
        except RemoteProtocolError as error:
            self._decline(request, hope, "tickets_malformed", str(error))
            return hope
        self._look_at(request, hope, hope.ticket)
        return hope

    def _prefix_hope(self, request: Any, params: Mapping[str, Any]) -> Hope | None:
        """What a prefill may load of its prompt instead of computing it."""
        found = prefix_of(params)
        if found is None:
            return None
        hope = self._hopes[request.request_id] = Hope(prefix=True)
        try:
            hope.ticket = from_params(found)
        except RemoteProtocolError as error:
            self._decline(request, hope, "prefixes_unusable", str(error))
        else:
            self._look_at(request, hope, hope.ticket)
        return hope

    def _look_at(self, request: Any, hope: Hope, ticket: Ticket) -> None:
        if hope.prefix:
            hope.tokens, problem = self._usable_prefix(request, ticket)
        else:
            hope.tokens, problem = ticket.tokens, self._problem(request, ticket)
        if problem is not None:
            self._decline(request, hope, *problem)
            self._side.portal.post(self._release, ticket)

    def _expect(self, stream: tuple[str, bytes]) -> None:
        self._side.portal.post(self._side.agent.start_expecting, *stream, self._side.config.prefill_wait_seconds)

    def _forgo(self, stream: tuple[str, bytes]) -> None:
        """Should there be a lease, or come one later, nobody will read under it."""
        self._side.portal.post(partial(self._side.agent.disclaim, *stream, renounce=True))

    def _scheduled(self, request: Any, hope: Hope) -> None:
        """The prefill that a request waits for is scheduled, or will not be."""
        assert hope.stream is not None
        note, hope.promised = hope.promised, None
        if note is None:
            return
        hope.waits, hope.ticket = False, note.ticket
        if note.ticket is None:
            self._forgo(hope.stream)
            self._decline(request, hope, "streams_without_lease", note.reason)
            return
        self._look_at(request, hope, note.ticket)
        if not hope.problem:
            self._side.portal.post(self._side.agent.keep, note.ticket)

    def _problem(self, request: Any, ticket: Ticket) -> tuple[str, str] | None:
        """(counter, words) why a ticket cannot serve this request."""
        if not self._side.consumes:
            return "wrong_role", _LOADS_NOTHING
        if request.prompt_token_ids is None:
            return "tickets_unusable", "the prompt is given as embeddings, its KV has no key"
        if not 0 < ticket.tokens <= request.num_prompt_tokens:
            return (
                "key_mismatches",
                f"the ticket covers {ticket.tokens} tokens, the prompt has {request.num_prompt_tokens}: "
                "tokenised differently?",
            )
        if ticket.key != self._side.key(request, ticket.tokens):
            return "key_mismatches", "the ticket is for other tokens, another LoRA, cache_salt or media"
        if self._side.shortens and ticket.tokens >= request.num_prompt_tokens:
            return "tickets_unusable", "its windows and states are those after the last token, which is computed here"
        if self._side.config.strict and ticket.tokens < request.num_prompt_tokens - 1:
            return "tickets_unusable", f"the ticket covers {ticket.tokens} of {request.num_prompt_tokens} tokens"
        if len(ticket.blocks) != len(self._side.groups):
            return (
                "tickets_unusable",
                f"the ticket has {len(ticket.blocks)} KV cache groups, this model {len(self._side.groups)}",
            )
        return None

    def _usable_prefix(self, request: Any, ticket: Ticket) -> tuple[int, tuple[str, str] | None]:
        """(how many tokens a prefill may load, (counter, words) why none)."""
        if not self._side.consumes:
            return 0, ("wrong_role", _LOADS_NOTHING)
        prompt = request.prompt_token_ids
        if prompt is None or any(self._side.late) or len(ticket.blocks) != len(self._side.groups):
            return 0, ("prefixes_unusable", "this prompt, or model, cannot be continued from another instance's KV")
        marks = sorted(mark for mark in (*ticket.marks, (ticket.tokens, ticket.key)) if 0 < mark[0] <= len(prompt))
        ours = self._side.keys(request, prompt, [tokens for tokens, _ in marks])
        tokens = max((tokens for (tokens, key), mine in zip(marks, ours, strict=True) if key == mine), default=0)
        if tokens < ticket.tokens:
            # A packed block is read as a whole: only the ticket's own end may lie within one.
            tokens -= tokens % max(self._side.block_tokens)
        return tokens, None if tokens else ("key_mismatches", "the prefix is of other tokens, LoRA, salt or media")

    def _decline(self, request: Any, hope: Hope, counter: str, why: str) -> None:
        """The ticket cannot serve: compute the prompt here, or, if that must not happen silently, let the load fail."""
        self._side.counters[counter] += 1
        hope.problem = why
        outcome = "fails" if self._side.config.strict and not hope.prefix else "computes its prompt here"
        logger.warning("request %s %s: %s", request.request_id, outcome, why)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """(tokens that can be loaded beyond ``computed``, asynchronously?); None of them to be asked again."""
        hope = self._hope(request)
        if hope is None or hope.attempted:
            return 0, False
        if hope.waits and hope.stream is not None and request.num_prompt_tokens - computed <= 1:
            # All of it is cached here: there is nothing to wait for.
            self._side.counters["tickets_not_needed"] += 1
            self._forgo(hope.stream)
            hope.waits, hope.attempted = False, True
            return 0, False
        if hope.waits:
            self._scheduled(request, hope)
            if hope.waits:
                return None, False
        if hope.ticket is not None and hope.ticket.capability in self._lost and hope.stream is not None:
            # Preempted, perhaps: then it will be scheduled again.
            self._lost.discard(hope.ticket.capability)
            hope.waits, hope.ticket = True, None
            self._expect(hope.stream)
            return None, False
        if hope.ticket is not None and hope.ticket.capability in self._lost:
            self._lost.discard(hope.ticket.capability)
            self._decline(request, hope, "tickets_lost", "the lease ended while the request waited in the queue")
        missing = request.num_prompt_tokens - computed
        if hope.problem:
            # The last prompt token would be computed here in any case.
            return (missing, True) if self._side.config.strict and missing > 1 and not hope.prefix else (0, False)
        assert hope.ticket is not None, "without one there is a problem"
        count = hope.tokens - computed
        # Loading the last prompt token alone would be loading for nothing.
        if count <= 0 or count == missing == 1:
            return 0, False
        return count, True

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Blocks exist: order the load, or give the ticket back when nothing is to be loaded."""
        hope = self._hope(request)
        if hope is None or hope.attempted:
            return
        hope.attempted = True
        self._side.accounts.ordered(request.request_id, max(hope.tokens - external_tokens, 0), external_tokens)
        if not external_tokens:
            if not hope.problem and hope.ticket is not None:
                self._side.counters["tickets_not_needed"] += 1
                self._side.portal.post(self._release, hope.ticket)
            return
        hope.loading = True
        ids = blocks.get_block_ids()
        tokens = request.num_prompt_tokens if hope.problem else hope.tokens
        wanted = [
            (state_blocks(ids[group]), (0, 1)) if state else _wanted(ids[group], size, tokens - external_tokens, tokens)
            for group, size, state in zip(self._side.groups, self._side.block_tokens, self._side.states, strict=True)
        ]
        if not hope.problem:
            self._side.portal.post(self._side.agent.drop, hope.ticket)
            self._side.counters["tokens_to_load"] += external_tokens
        if any(state and len(found) != 1 for state, (found, _) in zip(self._side.states, wanted, strict=True)):
            hope.problem = hope.problem or STATES
        block_ids, ranges = zip(*wanted, strict=True)
        follow = hope.stream is not None
        load = Load(request.request_id, hope.ticket, block_ids, ranges, hope.problem, follow, hope.prefix)
        self._side.orders.loads.append(load)

    def _release(self, ticket: Ticket) -> None:
        self._side.agent.release(ticket, whole=True)

    def finished(self, request: Any) -> None:
        # A request may end before anybody looked at it; its owner need not wait for the lease to run out.
        hope = self._hope(request)
        if hope is None:
            return
        del self._hopes[request.request_id]
        if hope.ticket is not None:
            self._lost.discard(hope.ticket.capability)
        if hope.waits and hope.stream is not None:
            self._forgo(hope.stream)
        if not hope.attempted and not hope.problem and hope.ticket is not None:
            self._side.portal.post(self._release, hope.ticket)
        elif hope.loading:
            self._side.orders.aborts.append(request.request_id)

    def scheduled(self, output: Any) -> None:
        """Count what is computed although it was handed over; the last prompt token always is."""
        for new in output.scheduled_new_reqs:
            if (
                (hope := self._hopes.get(new.req_id)) is not None
                and not hope.prefix
                and new.prompt_token_ids is not None
            ):
                missing = len(new.prompt_token_ids) - 1 - int(new.num_computed_tokens)
                self._side.counters["tokens_recomputed"] += max(missing, 0)

    def loaded(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            if (hope := self._hopes.get(request_id)) is not None:
                hope.loading = False

    def noted(self, note: ev.Note) -> None:
        match note:
            case ev.TicketLost(ticket):
                if any(hope.ticket is ticket for hope in self._hopes.values()):
                    self._lost.add(ticket.capability)
            case ev.Promised(address, capability):
                for hope in self._hopes.values():
                    if hope.waits and hope.stream == (address, capability):
                        hope.promised = note
            case _:
                pass


def _wanted(ids: Sequence[int], size: int, first: int, last: int) -> tuple[list[int], tuple[int, int]]:
    """Destination blocks of one group and the tokens that go there. Block 0 stands for blocks that a sliding window has
    left behind; nothing is read for them."""
    at = first // size
    blocks = list(ids[at : -(-last // size)])
    while blocks and blocks[0] == 0:
        del blocks[0]
        at += 1
    return (blocks, (max(first, at * size), last)) if blocks else ([], (last, last))
