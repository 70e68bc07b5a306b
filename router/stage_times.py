"""What the metrics are told of a request that has ended: where its time went, and what was computed twice."""

from collections.abc import Iterator

from pdserve.metrics import RouterMetrics
from router.progress import Attempt, Progress
from router.request_reports import RequestReport, Stage, StageName

_NAMES = {
    StageName.ROUTER_QUEUE: "router_queue",
    StageName.PREFILL_QUEUE: "prefill_queue",
    StageName.PREFILL: "prefill",
    StageName.TRANSFER: "transfer_exposed",
    StageName.PROMPT: "prompt",
    StageName.DECODE: "decode",
}


def tell_stages(metrics: RouterMetrics, progress: Progress, report: RequestReport) -> None:
    """`report` is the last of `progress`."""
    for name, seconds in (*_stages(report), *_between_stages(report)):
        metrics.stages.observe(name, max(0.0, seconds), progress.request_id)
    before: Attempt | None = None
    for attempt in progress.attempts:
        _tell_tokens(metrics, attempt, before)
        before = attempt


def _stages(report: RequestReport) -> Iterator[tuple[str, float]]:
    for stage in report.stages:
        seconds = _duration_s(stage)
        if seconds is not None:
            yield _NAMES[stage.name], seconds


def _between_stages(report: RequestReport) -> Iterator[tuple[str, float]]:
    """What lies beside the stages of a report: the transfer behind the prefill, and the first token's way."""
    for attempt in report.attempts:
        timings = attempt.timings
        if timings is None:
            continue
        if timings.transfer_is_whole:
            yield "transfer_hidden", timings.transfer_hidden_s
        if attempt.first_token_s is not None:
            since_submitted_s = attempt.first_token_s - attempt.submitted_s
            yield "first_token", since_submitted_s - timings.queue_s - timings.prefill_s


def _tell_tokens(metrics: RouterMetrics, attempt: Attempt, before: Attempt | None) -> None:
    timings = attempt.timings
    if timings is None:  # nothing is known of what its workers had
        return
    at_prefill, at_decode = timings.cached_prompt_tokens_prefill, timings.cached_prompt_tokens_decode
    metrics.stages.count_cached("prefill", at_prefill)
    metrics.stages.count_cached("decode", at_decode)
    if before is not None:
        cached = at_decode if attempt.placement.prefill is None else at_prefill
        metrics.stages.count_recomputed(before.end or "", attempt.num_known - cached)


def _duration_s(stage: Stage) -> float | None:
    return None if stage.end_s is None else stage.end_s - stage.start_s
