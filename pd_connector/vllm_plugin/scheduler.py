"""Scheduler side: decides what is leased and what is loaded; speaks for the workers on the advertised port.

Nothing here waits: the agent runs in a portal, its notes come back through a queue that the next step drains.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import RequestStatus

from pd_connector.cache.prefix import extend_key, root_key
from pd_connector.errors import ConfigError, RemoteProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import CAPABILITY_BYTES, Endpoint
from pd_connector.protocol.params import from_params, to_params
from pd_connector.protocol.ticket import Ticket
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.portal import Portal
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.identity import model_identity
from pd_connector.vllm_plugin.metadata import Handshake, Load, StepOrders
from pd_connector.vllm_plugin.metrics import LOOK_SECONDS, PDStats
from pd_connector.vllm_plugin.settings import instance_config

logger = logging.getLogger(__name__)

_EXPIRED = "it expired"
"""Reason of an expired lease. Ours may expire while a reader still renews the workers' at the workers."""

_STATES = "its states lie in several blocks (mamba_cache_mode), which are not handed over"


@dataclass
class Hope:
    """A decode request that was handed over and may load its prompt's KV: the one attempt it has. ``problem`` says why
    its ticket, if it has one at all, cannot serve."""

    ticket: Ticket | None = None
    problem: str = ""
    attempted: bool = False
    loading: bool = False


class PDScheduler:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config = vllm_config
        transfer = vllm_config.kv_transfer_config
        self._engine_id = str(transfer.engine_id)
        self._produces, self._consumes = transfer.is_kv_producer, transfer.is_kv_consumer
        self.groups = compat.transfer_groups(kv_cache_config)
        specs = [kv_cache_config.kv_cache_groups[group].kv_cache_spec for group in self.groups]
        self._block_tokens = [int(spec.block_size) for spec in specs]
        self._states = [compat.is_state(spec) for spec in specs]
        self._shortens = any(self._states) or any(map(compat.forgets, specs))
        self._config = instance_config(vllm_config)
        self._strict = self._config.strict
        if self._strict and getattr(transfer, "kv_load_failure_policy", "") != "fail":
            raise ConfigError('strict needs "kv_load_failure_policy": "fail": a failed load would be computed again')
        self._model = self._config.model or model_identity(vllm_config.model_config)
        self._notes: deque[ev.Note] = deque()
        self._orders = StepOrders()
        self._hopes: dict[str, Hope] = {}
        self._shortened: set[str] = set()
        self._lost: set[bytes] = set()
        self._leases: dict[int, str] = {}
        self._lease_of: dict[str, int] = {}
        self._last_lease = 0
        self._counters: Counter[str] = Counter()
        self._empty_steps = 0
        self._steps_in_flight = compat.steps_in_flight(vllm_config)
        self._next_look = 0.0
        self._spoken: Counter[str] = Counter()
        self._spoken_now: Counter[str] = Counter()
        self._closed = False
        self._portal = Portal("pdc-scheduler", self._config.io_cpus)
        self._agent = Agent(self._config, name=self._engine_id, on_note=self._notes.append)
        self._agent.identify(self._model)
        self._portal.call(self._agent.start)
        logger.info("PDConnector: engine %s answers at %s", self._engine_id, self._agent.address)

    def set_handshakes(self, handshakes: Mapping[tuple[int, int], Handshake]) -> None:
        """All workers are up: tell peers where their ranks listen."""
        tensor_parallel = int(self._vllm_config.parallel_config.tensor_parallel_size)
        ranks = [
            Endpoint(stage * tensor_parallel + rank, shake.address, shake.incarnation, shake.layout)
            for (stage, rank), shake in sorted(handshakes.items())
        ]
        self._portal.call(self._agent.speak_for, ranks)
        self._orders.instance = tuple(rank.layout for rank in ranks)

    # --- decode side --------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Keep the ticket's lease alive while the request waits in the queue."""
        if self._shortens and (request.kv_transfer_params or {}).get("do_remote_decode") and _shorten(request):
            self._shortened.add(request.request_id)
        hope = self._hope(request)
        if hope is not None and hope.ticket is not None and not hope.problem:
            self._portal.post(self._agent.keep, hope.ticket)

    def _hope(self, request: Any) -> Hope | None:
        """What a request may load, looked at once; None when it was not handed over."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        if (known := self._hopes.get(request.request_id)) is not None:
            return known
        hope = self._hopes[request.request_id] = Hope()
        try:
            hope.ticket = from_params(params)
        except RemoteProtocolError as error:
            self._decline(request, hope, "tickets_malformed", str(error))
            return hope
        problem = self._problem(request, hope.ticket)
        if problem is not None:
            self._decline(request, hope, *problem)
            self._portal.post(self._release, hope.ticket)
        return hope

    def _problem(self, request: Any, ticket: Ticket) -> tuple[str, str] | None:
        """(counter, words) why a ticket cannot serve this request."""
        if not self._consumes:
            return "wrong_role", "kv_role kv_producer loads nothing; use kv_consumer or kv_both"
        if request.prompt_token_ids is None:
            return "tickets_unusable", "the prompt is given as embeddings, its KV has no key"
        if not 0 < ticket.tokens <= request.num_prompt_tokens:
            return (
                "key_mismatches",
                f"the ticket covers {ticket.tokens} tokens, the prompt has {request.num_prompt_tokens}: "
                "tokenised differently?",
            )
        if ticket.key != self._key(request, ticket.tokens):
            return "key_mismatches", "the ticket is for other tokens, another LoRA, cache_salt or media"
        if self._shortens and ticket.tokens >= request.num_prompt_tokens:
            return "tickets_unusable", "its windows and states are those after the last token, which is computed here"
        if self._strict and ticket.tokens < request.num_prompt_tokens - 1:
            return "tickets_unusable", f"the ticket covers {ticket.tokens} of {request.num_prompt_tokens} tokens"
        if len(ticket.blocks) != len(self.groups):
            return (
                "tickets_unusable",
                f"the ticket has {len(ticket.blocks)} KV cache groups, this model {len(self.groups)}",
            )
        return None

    def _key(self, request: Any, tokens: int) -> bytes:
        lora = request.lora_request.lora_name if request.lora_request is not None else ""
        media = tuple(item for item in compat.media_of(request) if item[0] < tokens)
        root = root_key(model=self._model, salt=request.cache_salt or "", lora=lora, media=media)
        return extend_key(root, request.prompt_token_ids[:tokens])

    def _decline(self, request: Any, hope: Hope, counter: str, why: str) -> None:
        """The ticket cannot serve: compute the prompt here, or, if that must not happen silently, let the load fail."""
        self._counters[counter] += 1
        hope.problem = why
        outcome = "fails" if self._strict else "computes its prompt here"
        logger.warning("request %s %s: %s", request.request_id, outcome, why)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        """(tokens that can be loaded beyond ``computed``, asynchronously?)."""
        hope = self._hope(request)
        if hope is None or hope.attempted:
            return 0, False
        if hope.ticket is not None and hope.ticket.capability in self._lost:
            self._lost.discard(hope.ticket.capability)
            self._decline(request, hope, "tickets_lost", "the lease ended while the request waited in the queue")
        missing = request.num_prompt_tokens - computed
        if hope.problem:
            # The last prompt token would be computed here in any case.
            return (missing, True) if self._strict and missing > 1 else (0, False)
        assert hope.ticket is not None, "without one there is a problem"
        count = hope.ticket.tokens - computed
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
        if not external_tokens:
            if not hope.problem and hope.ticket is not None:
                self._counters["tickets_not_needed"] += 1
                self._portal.post(self._release, hope.ticket)
            return
        hope.loading = True
        ids = blocks.get_block_ids()
        tokens = request.num_prompt_tokens if hope.problem or hope.ticket is None else hope.ticket.tokens
        wanted = [
            (_state(ids[group]), (0, 1)) if state else _wanted(ids[group], size, tokens - external_tokens, tokens)
            for group, size, state in zip(self.groups, self._block_tokens, self._states, strict=True)
        ]
        if not hope.problem:
            self._portal.post(self._agent.drop, hope.ticket)
            self._counters["tokens_to_load"] += external_tokens
        if any(state and len(found) != 1 for state, (found, _) in zip(self._states, wanted, strict=True)):
            hope.problem = hope.problem or _STATES
        block_ids, ranges = zip(*wanted, strict=True)
        self._orders.loads.append(Load(request.request_id, hope.ticket, block_ids, ranges, hope.problem))

    def _release(self, ticket: Ticket) -> None:
        self._agent.release(ticket, whole=True)

    # --- prefill side -------------------------------------------------------------------------------------------------

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended: lease its blocks if it was a prefill for somebody else. (delay the free?, ticket)."""
        self._finish_hope(request)
        shortened = request.request_id in self._shortened
        self._shortened.discard(request.request_id)
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return False, None
        if not self._produces:
            self._keep_back(request, "wrong_role", "kv_role kv_consumer hands nothing over; use kv_producer or kv_both")
            return False, None
        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        if not done or not any(block_ids) or not tokens or request.prompt_token_ids is None:
            return False, None
        if self._shortens and not shortened:
            self._keep_back(
                request, "states_not_handed_over", "its prompt, of embeddings or one token, has no last token less"
            )
            return False, None
        blocks = tuple(
            tuple(_state(block_ids[group]) if state else block_ids[group][: -(-tokens // size)])
            for group, size, state in zip(self.groups, self._block_tokens, self._states, strict=True)
        )
        if any(state and len(ids) != 1 for state, ids in zip(self._states, blocks, strict=True)):
            self._keep_back(request, "states_not_handed_over", _STATES)
            return False, None
        self._last_lease += 1
        ticket = Ticket(
            address=self._agent.address,
            incarnation=self._agent.incarnation,
            lease=self._last_lease,
            epoch=1,
            capability=secrets.token_bytes(CAPABILITY_BYTES),
            blocks=blocks,
            tokens=tokens,
            key=self._key(request, tokens),
        )
        self._leases[ticket.lease] = request.request_id
        self._lease_of[request.request_id] = ticket.lease
        self._orders.grants.append((request.request_id, ticket))
        self._portal.post(self._grant_here, ticket)
        parallel = self._vllm_config.parallel_config
        return True, to_params(
            ticket,
            request_id=request.request_id,
            engine_id=self._engine_id,
            tp_size=int(parallel.tensor_parallel_size),
            pp_size=int(parallel.pipeline_parallel_size),
        )

    def _keep_back(self, request: Any, counter: str, why: str) -> None:
        self._counters[counter] += 1
        logger.warning("request %s is not handed over: %s", request.request_id, why)

    def _grant_here(self, ticket: Ticket) -> None:
        """A lease of the same number on the advertised agent, so that it answers RENEW and RELEASE. It lasts as long as
        the workers' own, because its answers tell the reader how often to renew; those decide when one expires."""
        self._agent.grant(ticket)

    def _finish_hope(self, request: Any) -> None:
        # A request may end before anybody looked at it; its owner need not wait for the lease to run out.
        hope = self._hope(request)
        if hope is None:
            return
        del self._hopes[request.request_id]
        if hope.ticket is not None:
            self._lost.discard(hope.ticket.capability)
        if not hope.attempted and not hope.problem and hope.ticket is not None:
            self._portal.post(self._release, hope.ticket)
        elif hope.loading:
            self._orders.aborts.append(request.request_id)

    # --- every step ---------------------------------------------------------------------------------------------------

    def orders(self, scheduler_output: Any) -> StepOrders:
        while self._notes:
            self._take(self._notes.popleft())
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._hopes and new.prompt_token_ids is not None:
                # The last prompt token is always computed here.
                missing = len(new.prompt_token_ids) - 1 - int(new.num_computed_tokens)
                self._counters["tokens_recomputed"] += max(missing, 0)
        self._empty_steps = 0 if scheduler_output.total_num_scheduled_tokens else self._empty_steps + 1
        orders, self._orders = self._orders, StepOrders()
        orders.idle = self._empty_steps > self._steps_in_flight
        return orders

    def _take(self, note: ev.Note) -> None:
        match note:
            case ev.LeaseEnded(number, _, reason) if number in self._leases and reason != _EXPIRED:
                self._orders.ends.append((number, reason))
            case ev.LeaseRenewed(number, _) if number in self._leases:
                self._orders.extends.append(number)
            case ev.TicketLost(ticket):
                if any(hope.ticket is ticket for hope in self._hopes.values()):
                    self._lost.add(ticket.capability)
            case _:
                pass

    def workers_reported(self, output: Any) -> None:
        for request_id in output.finished_recving or ():
            if (hope := self._hopes.get(request_id)) is not None:
                hope.loading = False
        for request_id in output.finished_sending or ():
            if (number := self._lease_of.pop(request_id, None)) is not None:
                del self._leases[number]
                self._portal.post(self._agent.end, number, "every worker ended it")

    def stats(self) -> PDStats | None:
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._portal.post(self._look)
        spoken = self._spoken_now
        fresh = Counter({f"speaker_{key}": n for key, n in (spoken - self._spoken).items() if "lease" not in key})
        self._spoken = spoken
        if not self._counters and not fresh:
            return None
        counters, self._counters = self._counters + fresh, Counter()
        return PDStats.of(counters=counters)

    def _look(self) -> None:
        """On the loop: counters change there, another thread must not iterate over them."""
        self._spoken_now = self._agent.counters()

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._portal.run(self._agent.close(), timeout=10)
        finally:
            self._portal.close()


def _wanted(ids: Sequence[int], size: int, first: int, last: int) -> tuple[list[int], tuple[int, int]]:
    """Destination blocks of one group and the tokens that go there. Block 0 stands for blocks that a sliding window has
    left behind; nothing is read for them."""
    at = first // size
    blocks = list(ids[at : -(-last // size)])
    while blocks and blocks[0] == 0:
        del blocks[0]
        at += 1
    return (blocks, (max(first, at * size), last)) if blocks else ([], (last, last))


def _state(ids: Sequence[int]) -> list[int]:
    """The block of a request's state, after its last token: there is one, unless states are kept for prefixes, too."""
    return [block for block in ids if block]


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
