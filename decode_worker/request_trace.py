"""What the trace of a request tells of its decode worker: one span, and below it one for each phase."""

from pdserve.contract.messages import RequestTimings, Submit
from pdserve.contract.ports import Clock
from pdserve.contract.tracing import Attributes, SpanKind, TraceContext, Tracer


class RequestTrace:
    """From the submission to its end."""

    def __init__(self, submit: Submit, tracer: Tracer, clock: Clock) -> None:
        self._span = tracer.begin("decode worker", SpanKind.SERVER, submit.trace, _names(submit))
        self._clock = clock
        self._stage_began_at = clock.now()

    @property
    def context(self) -> TraceContext | None:
        """The parent of what the prefill worker does for the request."""
        return self._span.context

    def stage_ends(self, name: str) -> None:
        """Another one begins."""
        now = self._clock.now()
        self._span.add_stage(name, self._stage_began_at, now)
        self._stage_began_at = now

    def end(self, outcome: str, timings: RequestTimings) -> None:
        self._span.end(outcome, _what_came(timings) if self._span.context is not None else None)


def _names(submit: Submit) -> Attributes:
    return {"pdserve.request_id": submit.request_id, "pdserve.attempt": submit.attempt}


def _what_came(timings: RequestTimings) -> Attributes:
    return {
        "pdserve.cached_tokens": timings.cached_prompt_tokens_decode,
        "pdserve.transport": timings.transport,
        "pdserve.transfer_bytes": timings.transfer_bytes,
        "pdserve.transfer_exposed_s": timings.transfer_exposed_s,
    }
