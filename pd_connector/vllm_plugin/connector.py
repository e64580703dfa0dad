"""PDConnector: vLLM's connector interface, delegated to the scheduler side or the worker side by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.metadata import Handshake, StepOrders
from pd_connector.vllm_plugin.metrics import PDPromMetrics, PDStats
from pd_connector.vllm_plugin.scheduler import PDScheduler
from pd_connector.vllm_plugin.worker import PDWorker


class PDConnector(KVConnectorBase_V1, *compat.hybrid_bases()):  # type: ignore[misc]
    """Hands KV blocks from prefill to decode instances: the decode side reads, the prefill side leases and confirms."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        compat.share_engine_logging()
        self._scheduler: PDScheduler | None = None
        self._worker: PDWorker | None = None
        self._applied: StepOrders | None = None
        self._computed: StepOrders | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = PDScheduler(vllm_config, kv_cache_config)
        else:
            self._worker = PDWorker(vllm_config, kv_cache_config)

    @property
    def scheduler(self) -> PDScheduler:
        assert self._scheduler is not None, "called on the worker's side"
        return self._scheduler

    @property
    def worker(self) -> PDWorker:
        assert self._worker is not None, "called on the scheduler's side"
        return self._worker

    # --- scheduler side -----------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return self.scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self.scheduler.workers_reported(connector_output)

    def reset_cache(self) -> bool | None:
        return None if self._scheduler is None else self._scheduler.reset_cache()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.finished(request, block_ids)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return self.scheduler.groups

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, Handshake]) -> None:
        self.scheduler.set_handshakes({(0, rank): shake for rank, shake in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Handshake]) -> None:
        self.scheduler.set_handshakes(metadata)

    # --- worker side --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        self.worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        return self.worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._apply(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        # Usually handle_preemptions came first, before the forward; it does not on every path of every version.
        self._apply(self._get_connector_metadata())

    def _apply(self, orders: Any) -> None:
        if orders is not self._applied:
            self._applied = orders
            self.worker.apply(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end before their request is scheduled: there is nothing to wait for in a forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The decode side reads from the cache itself: nothing is saved."""

    def wait_for_save(self) -> None:
        """The step's forward is launched; in host memory it is done."""
        orders: Any = self._get_connector_metadata()
        if orders is not self._computed:
            self._computed = orders
            self.worker.computed(orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        finished = self.worker.finished()
        return finished.sent or None, finished.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        finished = self.worker.finished()
        return compat.transfer_results(finished.sent, finished.received, finished.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_failed_blocks()

    # --- both ---------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PDStats | None:
        return self._scheduler.stats() if self._scheduler is not None else self.worker.stats()

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Not yet: an engine that sleeps gives its memory away, and what is registered here would be read."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return compat.required_layout(vllm_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PDStats:
        return PDStats(data=data) if data else PDStats.of()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PDPromMetrics:
        return PDPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()
