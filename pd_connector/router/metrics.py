"""The router's Prometheus metrics. Every label is from a closed set: routes, legs, outcomes, configured upstreams."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class RouterMetrics:
    """One registry per router, so that two routers in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pdc_router_requests",
            "Requests by how they ended: ok, refused (4xx), failed (5xx), overloaded, broken (after the first byte), "
            "client_gone.",
            ["route", "outcome"],
            registry=self.registry,
        )
        self.leg_seconds = Histogram(
            "pdc_router_leg_seconds",
            "Prefill leg: whole. Decode leg: to the first token (to the whole answer when not streaming).",
            ["leg", "upstream"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.leg_failures = Counter(
            "pdc_router_leg_failures", "Failed attempts of a leg.", ["leg", "upstream"], registry=self.registry
        )
        self.retries = Counter("pdc_router_retries", "Attempts after a failed one.", ["leg"], registry=self.registry)
        self.releases = Counter(
            "pdc_router_releases", "Tickets released because no decode used them.", registry=self.registry
        )
        self.release_failures = Counter(
            "pdc_router_release_failures", "Releases that raised or did not return in time.", registry=self.registry
        )
        self.ticketless = Counter(
            "pdc_router_ticketless", "Prefill answers without a ticket: D computed the prompt.", registry=self.registry
        )
        self.hand_overs = Counter(
            "pdc_router_hand_overs",
            "Hand-overs by mode: streamed (both legs at once: long prompt) or sequential (short prompt, the prefill "
            "instance's address unknown, its queue, again after a streamed one failed).",
            ["mode", "why"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "pdc_router_ttft_stage_seconds",
            "Where the time to the first token went, per choice; all stages and unaccounted add up to it. Answers that "
            "are not streamed count as a whole.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "pdc_router_tokens",
            "Prompt tokens of which decode instances told: prompt (all), cached (they had them), expected (to be "
            "loaded), loaded; reused: prefill instances had them from an earlier turn.",
            ["kind"],
            registry=self.registry,
        )
        self.turns = Counter(
            "pdc_router_turns",
            "Turns of conversations: kept, not_kept (a decode instance says so), read (a later turn's prefill got the "
            "ticket), dropped (newer ones needed the room).",
            ["outcome"],
            registry=self.registry,
        )
        self.in_flight = Gauge("pdc_router_in_flight", "Choices under way.", registry=self.registry)
        self.upstream_in_flight = Gauge(
            "pdc_router_upstream_in_flight",
            "Legs under way on an upstream.",
            ["leg", "upstream"],
            registry=self.registry,
        )
        self.upstream_up = Gauge(
            "pdc_router_upstream_up", "0 while put aside as unreachable.", ["leg", "upstream"], registry=self.registry
        )
