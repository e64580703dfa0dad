"""Scheduler side: decides what is leased and what is loaded; speaks for the workers on the advertised port.

Nothing here waits: the agent runs in a portal, its notes come back through a queue that the next step drains.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Endpoint
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.decode_side import DecodeSide
from pd_connector.vllm_plugin.metadata import Handshake, StepOrders
from pd_connector.vllm_plugin.metrics import LOOK_SECONDS, PDStats, own_stats
from pd_connector.vllm_plugin.prefill_side import PrefillSide
from pd_connector.vllm_plugin.side import Side
from pd_connector.vllm_plugin.turn_side import TurnSide

logger = logging.getLogger(__name__)


class PDScheduler:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        parallel = vllm_config.parallel_config
        self._tensor_parallel = int(parallel.tensor_parallel_size)
        self._notes: deque[ev.Note] = deque()
        self.side = Side(vllm_config, kv_cache_config, self._note)
        self.decode = DecodeSide(self.side)
        sizes = self._tensor_parallel, int(parallel.pipeline_parallel_size), int(parallel.data_parallel_size)
        self.prefill = PrefillSide(self.side, sizes)
        self.turns = TurnSide(self.side, self.prefill.new_lease)
        self._empty_steps = 0
        self._steps_in_flight = compat.steps_in_flight(vllm_config)
        self._next_look = 0.0
        self._spoken: Counter[str] = Counter()
        self._spoken_now: Counter[str] = Counter()
        self._closed = False
        logger.info("PDConnector: engine %s answers at %s", self.side.engine_id, self.side.agent.address)

    def _note(self, note: ev.Note) -> None:
        """On the portal's thread. What strangers may send at any time must not wait for an engine that stands still."""
        if not isinstance(note, ev.Informed):
            self._notes.append(note)

    @property
    def groups(self) -> tuple[int, ...]:
        return self.side.groups

    def set_handshakes(self, handshakes: Mapping[tuple[int, int], Handshake]) -> None:
        """All workers are up: tell peers where their ranks listen."""
        ranks = [
            Endpoint(stage * self._tensor_parallel + rank, shake.address, shake.incarnation, shake.layout)
            for (stage, rank), shake in sorted(handshakes.items())
        ]
        self.side.portal.call(self.side.agent.speak_for, ranks)
        self.turns.set_pools([shake.pool for _, shake in sorted(handshakes.items()) if shake.pool is not None])
        self.side.orders.instance = tuple(rank.layout for rank in ranks)

    def on_new_request(self, request: Any) -> None:
        self.prefill.arrived(request)
        self.side.accounts.arrived(request)
        self.decode.arrived(request)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """(tokens that can be loaded beyond ``computed``, asynchronously?); None of them to be asked again."""
        self._take_notes()
        return self.decode.matched_tokens(request, computed)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        self.decode.allocated(request, blocks, external_tokens)

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended: (delay the free?, ticket)."""
        self.decode.finished(request)
        self.side.accounts.finished(request.request_id)
        delay, ticket = self.prefill.finished(request, block_ids)
        return delay or self.turns.finished(request, block_ids), ticket

    def orders(self, output: Any) -> StepOrders:
        """What the workers are to do in the step that was just scheduled."""
        self._take_notes()
        self.prefill.scheduled(output)
        self.decode.scheduled(output)
        self.side.orders.completes = self.side.accounts.scheduled(output)
        self._empty_steps = 0 if output.total_num_scheduled_tokens else self._empty_steps + 1
        orders, self.side.orders = self.side.orders, StepOrders()
        orders.idle = self._empty_steps > self._steps_in_flight
        orders.waiting = self.decode.waits
        return orders

    def _take_notes(self) -> None:
        self.turns.take_notes()
        while self._notes:
            note = self._notes.popleft()
            self.prefill.noted(note)
            self.decode.noted(note)

    def workers_reported(self, output: Any) -> None:
        for measured in own_stats(output.kv_connector_stats):
            self.side.accounts.measured(*measured.take_stamps())
            for number, done in measured.take_saves():
                self.turns.saved(number, done)
        self.turns.ended(output.finished_sending or set())
        self.decode.loaded(output.finished_recving or set())
        self.prefill.ended(output.finished_sending or set())

    def stats(self) -> PDStats | None:
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self.side.portal.post(self._look)
        spoken = self._spoken_now
        fresh = Counter({f"speaker_{key}": n for key, n in (spoken - self._spoken).items() if "lease" not in key})
        self._spoken = spoken
        stages = self.side.accounts.take_stages()
        if not self.side.counters and not fresh and not stages:
            return None
        counters, self.side.counters = self.side.counters + fresh, Counter()
        return PDStats.of(counters=counters, stages=stages)

    def _look(self) -> None:
        """On the loop: counters change there, another thread must not iterate over them."""
        self._spoken_now = self.side.agent.counters()

    def reset_cache(self) -> bool:
        """What is kept of earlier requests may be of weights that are not used any more."""
        self.turns.forget_all("the caches were reset")
        return True

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.turns.close()
            self.side.portal.run(self.side.agent.close(), timeout=10)
        finally:
            self.side.portal.close()
