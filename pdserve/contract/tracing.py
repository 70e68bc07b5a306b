"""Traces of requests, as journeys, worker loops and the hand-off see them.

Two implementations: `pdserve.tracing.OtlpTracer`, where `tracing.endpoint` is configured, and NO_TRACER. A
request has a few spans in each process, none per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pdserve.contract.errors import ErrorCode

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span of a trace, as W3C Trace Context writes it in headers and metadata."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, by which every tool finds the trace; empty in a context that has none."""
        parts = self.traceparent.split("-")
        return parts[1] if len(parts) > 1 else ""


class SpanKind(StrEnum):
    SERVER = "server"
    """Serves a call of another process."""
    CLIENT = "client"
    """Waits for another process."""
    INTERNAL = "internal"


class Span(Protocol):
    """Something that lasts, within one process."""

    @property
    def context(self) -> TraceContext | None:
        """What makes it the parent of other spans, here or in another process; None where nothing is
        traced."""
        ...

    def add_stage(self, name: str, start: float, end: float) -> None:
        """A span below this one that is over. Times are those of the process' Clock."""
        ...

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        """Now. `outcome` is a finish reason, an error code, or why it was cancelled."""
        ...


class Tracer(Protocol):
    """Begins the spans of one process."""

    def begin(
        self, name: str, kind: SpanKind, parent: TraceContext | None, attributes: Attributes | None = None
    ) -> Span:
        """A span from now on. Without a parent, or with one that is none, it begins a trace of its own."""
        ...

    async def close(self) -> None:
        """Send what has ended and is not sent yet, as far as that can be done in a moment. Idempotent."""
        ...


def is_failure(outcome: str) -> bool:
    """Whether a span that ended so has failed. That a client left is no failure."""
    return outcome in _FAILURES


class _NoSpan:
    """A span of a process that traces nothing."""

    @property
    def context(self) -> TraceContext | None:
        return None

    def add_stage(self, name: str, start: float, end: float) -> None:
        return

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        return


class _NoTracer:
    """Traces nothing, at the price of a call."""

    def begin(
        self, name: str, kind: SpanKind, parent: TraceContext | None, attributes: Attributes | None = None
    ) -> Span:
        return NO_SPAN

    async def close(self) -> None:
        return


_FAILURES = frozenset(code.value for code in ErrorCode if code is not ErrorCode.CANCELLED)

NO_SPAN: Span = _NoSpan()
NO_TRACER: Tracer = _NoTracer()
