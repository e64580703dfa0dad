"""OpenTelemetry spans of hand-overs, where opentelemetry is installed and the process has set a tracer provider up.

P's and D's own stages are told to the router anyway, so it makes the spans of all three; a traceparent of the client's
is their parent, and the hand-over's span is the parent of what the instances trace of themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pd_connector.errors import ConfigError
from pd_connector.router.ledger import Ledger

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:
    propagate = trace = None  # type: ignore[assignment]


class Trace:
    """The span of one hand-over. ``headers`` are those of its requests."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = dict(headers)
        self._span: Any = None
        if trace is None:
            return
        parent = propagate.extract(headers)
        self._span = trace.get_tracer("pd_connector").start_span("pdc.hand_over", parent, trace.SpanKind.SERVER)
        propagate.inject(self.headers, trace.set_span_in_context(self._span))

    def end(self, attributes: Mapping[str, str], ledger: Ledger | None) -> None:
        """With a child span per stage; without a ledger it has failed. Later calls do nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        if span.is_recording():
            span.set_attributes({f"pdc.{key}": value for key, value in attributes.items()})
            if ledger is None:
                span.set_status(trace.StatusCode.ERROR, "no first token")
            else:
                self._add_stages(span, ledger)
        span.end()

    def _add_stages(self, span: Any, ledger: Ledger) -> None:
        span.set_attributes({f"pdc.tokens.{key}": value for key, value in ledger.tokens.items()})
        span.set_attribute("pdc.ttft_seconds", ledger.wall)
        span.set_attribute("pdc.unaccounted_seconds", ledger.unaccounted)
        inside = trace.set_span_in_context(span)
        tracer = trace.get_tracer("pd_connector")
        epoch = time.time_ns() - time.monotonic_ns()
        for stage, begin, end in ledger.spans:
            tracer.start_span(f"pdc.{stage}", inside, start_time=begin + epoch).end(end_time=end + epoch)


def export_to(endpoint: str) -> None:
    """Send this process's spans to an OTLP endpoint (gRPC). Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(f"tracing needs {error.name!r}: pip install 'pd-connector[trace]'") from None
    if "://" not in endpoint:
        raise ConfigError(f"an OTLP endpoint is a URL such as http://127.0.0.1:4317, not {endpoint!r}")
    provider = TracerProvider(resource=Resource.create({"service.name": "pdc-router"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
