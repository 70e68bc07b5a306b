"""What the trace of a request tells of one Prefill call at its source."""

from pdserve.contract.messages import PrefillOpen
from pdserve.contract.tracing import Attributes, Span
from pdserve.handoff.prefill_job import JobState, PrefillJob


def names_of(opened: PrefillOpen) -> Attributes:
    """Which request it is for."""
    return {"pdserve.request_id": opened.request_id, "pdserve.attempt": opened.attempt}


def end_trace(span: Span, job: PrefillJob, outcome: str, now: float) -> None:
    """The call is over: queue, prefill and ship, as far as it came."""
    if span.context is None:
        return
    has_begun = job.state in (JobState.READY, JobState.COMPUTED)
    is_computed = job.state is JobState.COMPUTED
    span.add_stage("queue", job.queued_at, job.started_at if has_begun else now)
    if has_begun:
        span.add_stage("prefill", job.started_at, job.computed_at if is_computed else now)
    if is_computed:
        span.add_stage("ship", job.computed_at, now)
    span.end(outcome, {"pdserve.prompt_tokens": job.num_prompt, "pdserve.cached_tokens": job.num_cached})
