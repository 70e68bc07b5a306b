"""What an OpenTelemetry collector does with spans, as far as a test needs it: take them, over OTLP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the wire. Ids are hexadecimal, times Unix nanoseconds."""

    process: str
    """service.instance.id"""
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    start_ns: int
    end_ns: int
    has_failed: bool
    attributes: dict[str, Any]


@dataclass
class OtlpReceiver:
    """Everything that has come."""

    spans: list[ReceivedSpan] = field(default_factory=list)
    url: str = ""

    async def Export(  # noqa: N802  # the service's name for it
        self, request: pb.ExportTraceServiceRequest, context: object
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            process = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_received(process, span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def parents(self) -> set[tuple[str, str]]:
        """Every span with the one above it, as ``process name``; "" where that is not from here."""
        by_id = {span.span_id: span for span in self.spans}
        names = {span_id: f"{span.process} {span.name}" for span_id, span in by_id.items()}
        return {(names[span.span_id], names.get(span.parent_id, "")) for span in self.spans}

    def the(self, process: str, name: str) -> ReceivedSpan:
        (span,) = [span for span in self.spans if (span.process, span.name) == (process, name)]
        return span


@asynccontextmanager
async def otlp_receiver() -> AsyncIterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    server = grpc.aio.server()
    pb_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # generated
    receiver.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


def _received(process: dict[str, Any], span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        process["service.instance.id"],
        process["service.name"],
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == span.status.STATUS_CODE_ERROR,
        _values(span.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
