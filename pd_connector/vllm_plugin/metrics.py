"""Stats that travel from workers and scheduler side to vLLM's logger, and the Prometheus metrics made of them.

Names mirror NIXL's under the prefix ``vllm:pdc_``. Peers are a label with a bounded number of values.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from pd_connector.protocol.events import TransferStats
from pd_connector.runtime.clock import clock_id

MAX_PEERS = 64
"""Peers with a label value of their own; all further ones share ``other``."""

LOOK_SECONDS = 0.5
"""Between looks at counters that no result announces."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BYTES = tuple(float(2**exponent) for exponent in range(12, 36, 2))


@dataclass(frozen=True, slots=True)
class Transferred:
    """One ended load."""

    stats: TransferStats
    outcome: str
    error: str
    peer: str
    request_id: str = ""
    ended: int = 0
    """A stamp."""

    def plain(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "error": self.error,
            "peer": self.peer.partition("#")[0],
            "transport": self.stats.transport,
            "connect": self.stats.connect,
            "wire": self.stats.wire,
            "commit": self.stats.commit,
            "tail": self.stats.tail,
            "bytes": self.stats.bytes,
            "compared": self.stats.digests_compared,
            "request_id": self.request_id,
            "ended": self.ended,
        }


class PDStats(KVConnectorStats):
    """``data``: counters (increments), transfers (a list of plain dicts), gauges (per worker rank, last values), stages
    ((name, seconds) of a request); for our scheduler side, forwards ((request, stamp of its end)) with the clock of
    stamps and saves ((lease of the host pool, is it there?))."""

    data: dict[str, Any]

    @classmethod
    def of(
        cls,
        *,
        counters: Mapping[str, int] | None = None,
        transfers: Sequence[Transferred] = (),
        gauges: Mapping[str, Mapping[str, int]] | None = None,
        stages: Sequence[tuple[str, float]] = (),
        forwards: Sequence[tuple[str, int]] = (),
        saves: Sequence[tuple[int, bool]] = (),
    ) -> PDStats:
        return cls(
            data={
                "counters": dict(counters or {}),
                "transfers": [transfer.plain() for transfer in transfers],
                "gauges": {rank: dict(values) for rank, values in (gauges or {}).items()},
                "stages": [list(each) for each in stages],
                "forwards": [list(each) for each in forwards],
                "saves": [list(each) for each in saves],
                "clock": clock_id(),
            }
        )

    def reset(self) -> None:
        self.data = PDStats.of().data

    def take_stamps(self) -> tuple[str, list[Any], list[dict[str, Any]]]:
        """(clock, forwards, transfers): what says when. The metrics do not need the forwards any more."""
        forwards, self.data["forwards"] = self.data.get("forwards", []), []
        return self.data.get("clock", ""), forwards, self.data.get("transfers", [])

    def take_saves(self) -> list[tuple[int, bool]]:
        saves, self.data["saves"] = self.data.get("saves", []), []
        return [(number, done) for number, done in saves]

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        if not self.data:
            self.reset()
        if other.data:
            self.data["counters"] = dict(Tally(self.data["counters"]) + Tally(other.data["counters"]))
            for key in ("transfers", "stages", "forwards", "saves"):
                self.data[key] = [*self.data[key], *other.data[key]]
            self.data["gauges"] = {**self.data["gauges"], **other.data["gauges"]}
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log."""
        transfers = self.data.get("transfers", [])
        done = [transfer for transfer in transfers if transfer["outcome"] == "done"]
        megabytes = sum(transfer["bytes"] for transfer in done) / 2**20
        seconds = sum(transfer["wire"] for transfer in done)
        return {
            "Num successful transfers": len(done),
            "Num failed transfers": len(transfers) - len(done),
            "Avg xfer time (ms)": round(1e3 * mean([t["wire"] for t in done] or [0.0]), 3),
            "Avg commit time (ms)": round(1e3 * mean([t["commit"] for t in done] or [0.0]), 3),
            "Throughput (MB/s)": round(megabytes / seconds, 1) if seconds else 0,
            "Num KV expired reqs": self.data.get("counters", {}).get("leases_expired", 0),
            "Recomputed tokens": self.data.get("counters", {}).get("tokens_recomputed", 0),
        }

    def is_empty(self) -> bool:
        return not any(self.data.get(key) for key in ("counters", "transfers", "gauges", "stages", "forwards", "saves"))


def own_stats(stats: Any) -> list[PDStats]:
    """Ours among the stats of a step; inside vLLM's MultiConnector they come with those of other connectors."""
    if isinstance(stats, PDStats):
        return [stats]
    children = getattr(stats, "data", None)
    return [each for each in children.values() if isinstance(each, PDStats)] if isinstance(children, dict) else []


class PDPromMetrics(KVConnectorPromMetrics):
    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        histogram, counter, gauge = metric_types[Histogram], metric_types[Counter], metric_types[Gauge]
        peer = [*labelnames, "peer"]
        self._peers: set[str] = set()
        self._times = {
            stage: histogram(f"vllm:pdc_{name}", words, buckets=_SECONDS, labelnames=peer)
            for stage, name, words in (
                ("connect", "connect_time_seconds", "Time from the load's start to its first read."),
                ("wire", "xfer_time_seconds", "Time in which something was being read."),
                ("commit", "commit_time_seconds", "Time from the last byte to the owner's verdict."),
            )
        }
        self._stages = histogram(
            "vllm:pdc_stage_seconds",
            "Stages of a handed-over request in this engine: p_queue (at P: until it is scheduled), prefill (until the "
            "prompt's last forward has ended), d_queue (at D: in its queue, before and after the load).",
            buckets=_SECONDS,
            labelnames=[*labelnames, "stage"],
        )
        self._bytes = histogram("vllm:pdc_bytes_transferred", "Bytes per load.", buckets=_BYTES, labelnames=peer)
        self._failed = counter(
            "vllm:pdc_num_failed_transfers", "Loads that ended without usable bytes.", labelnames=[*peer, "error"]
        )
        self._compared = counter(
            "vllm:pdc_audit_digests_compared", "Digests equal on both sides.", labelnames=labelnames
        )
        self._expired = counter("vllm:pdc_num_kv_expired_reqs", "Leases that expired.", labelnames=labelnames)
        self._recomputed = counter(
            "vllm:pdc_recomputed_tokens", "Prompt tokens that should have been loaded.", labelnames=labelnames
        )
        self._events = counter("vllm:pdc_events", "Everything else, by kind.", labelnames=[*labelnames, "event"])
        self._state = gauge(
            "vllm:pdc_state", "What is held or under way now.", labelnames=[*labelnames, "worker", "state"]
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for transfer in transfer_stats_data.get("transfers", ()):
            peer = self._peer(transfer["peer"])
            if transfer["outcome"] == "done":
                for stage, metric in self._times.items():
                    metric.labels(*labels, peer).observe(transfer[stage])
                self._bytes.labels(*labels, peer).observe(transfer["bytes"])
                self._compared.labels(*labels).inc(transfer["compared"])
            else:
                self._failed.labels(*labels, peer, transfer["error"] or transfer["outcome"]).inc()
        for stage, seconds in transfer_stats_data.get("stages", ()):
            self._stages.labels(*labels, stage).observe(seconds)
        for event, count in transfer_stats_data.get("counters", {}).items():
            self._events.labels(*labels, event).inc(count)
            if event == "leases_expired":
                self._expired.labels(*labels).inc(count)
            elif event == "tokens_recomputed":
                self._recomputed.labels(*labels).inc(count)
        for worker, values in transfer_stats_data.get("gauges", {}).items():
            for state, value in values.items():
                self._state.labels(*labels, worker, state).set(value)

    def _peer(self, peer: str) -> str:
        if peer not in self._peers:
            if len(self._peers) >= MAX_PEERS:
                return "other"
            self._peers.add(peer)
        return peer
