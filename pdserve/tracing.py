"""Traces over OTLP to an OpenTelemetry collector. Imported only where `tracing.endpoint` is configured: the
packages are those of the extra `otel`.

Spans are handed to a thread of OpenTelemetry's own, which sends them in batches. A collector that is slow or
away costs spans, never a request.
"""

import asyncio
import contextlib
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import pdserve
from pdserve.contract.ports import Clock
from pdserve.contract.tracing import Attributes, Span, SpanKind, TraceContext, is_failure

EXPORT_TIMEOUT_S = 2.0
"""After so long a batch that the collector has not taken is dropped."""
CLOSE_TIMEOUT_S = 2.0

OUTCOME = "pdserve.outcome"

_KINDS = {
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
}
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpTracer:
    """Sends the spans of one process to `endpoint`. Implements `pdserve.contract.tracing.Tracer`."""

    def __init__(self, endpoint: str, sample_ratio: float, process: Mapping[str, str], clock: Clock) -> None:
        """`endpoint` is http://host:port or https://host:port. `sample_ratio` is the share of traces that
        begin here; those of a client that has decided itself are as it says. `process` are the attributes
        that name this process (``service.*``)."""
        resource = Resource.create({"service.version": pdserve.__version__, **process})
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pdserve", pdserve.__version__)
        self._clock = clock
        self._is_closed = False

    def begin(
        self, name: str, kind: SpanKind, parent: TraceContext | None, attributes: Attributes | None = None
    ) -> Span:
        now, unix_time = self._clock.now(), self._clock.unix_time()
        begun = self._tracer.start_span(
            name, _read(parent), _KINDS[kind], dict(attributes or {}), start_time=_nanoseconds(unix_time)
        )
        return OtlpSpan(self._tracer, begun, self._clock, unix_time - now)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)


class OtlpSpan:
    """Implements `pdserve.contract.tracing.Span`."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, clock: Clock, unix_offset_s: float) -> None:
        """`unix_offset_s` is added to the clock's time: what is below this span is on one scale with it."""
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._unix_offset_s = unix_offset_s
        self._context = _write(span)

    @property
    def context(self) -> TraceContext | None:
        return self._context

    def add_stage(self, name: str, start: float, end: float) -> None:
        if not self._span.is_recording():
            return
        stage = self._tracer.start_span(name, _around(self._span), start_time=self._unix_ns(start))
        stage.end(self._unix_ns(end))

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        self._span.set_attributes({OUTCOME: outcome, **(attributes or {})})
        if is_failure(outcome):
            self._span.set_status(trace.StatusCode.ERROR, outcome)
        self._span.end(self._unix_ns(self._clock.now()))

    def _unix_ns(self, at: float) -> int:
        return _nanoseconds(self._unix_offset_s + at)


def _read(parent: TraceContext | None) -> Context:
    """Nothing where there is no parent or its form is wrong, as the standard says."""
    if parent is None:
        return Context()
    carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
    return _PROPAGATOR.extract(carrier, Context())


def _write(span: trace.Span) -> TraceContext:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, _around(span))
    return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))


def _around(span: trace.Span) -> Context:
    return trace.set_span_in_context(span, Context())


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
