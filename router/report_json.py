"""A request's report: as JSON for operators, as its client's `timings`, as the fields of a log line and as
the attributes of a span."""

from collections.abc import Mapping
from typing import Any

from pdserve.contract.messages import RequestTimings
from pdserve.contract.tracing import Attributes
from router.placement.policy import Prediction
from router.request_reports import AttemptReport, Decision, RequestReport, Stage


def report_json(report: RequestReport) -> dict[str, Any]:
    """All of it, for operators. docs/api.md describes the fields."""
    origin = report.origin
    return {
        "request_id": report.request_id,
        "answer_id": origin.answer_id,
        "choice": origin.choice,
        "client_request_id": origin.client_request_id,
        "trace_id": None if origin.trace is None else origin.trace.trace_id,
        "api": origin.api,
        "model": origin.model,
        "state": report.state.value,
        "outcome": report.outcome,
        "message": report.message,
        "arrived_at": _rounded(report.arrived_at),
        "prompt_tokens": report.num_prompt_tokens,
        "output_tokens": report.num_output_tokens,
        **_milestones(report),
        "ended_s": _rounded(report.ended_s),
        "num_attempts": report.num_attempts,
        "recoveries": dict(report.recoveries),
        "attempts": [_full_attempt(attempt) for attempt in report.attempts],
        "stages": [_stage(stage) for stage in report.stages],
    }


def decision_json(decision: Decision) -> dict[str, Any]:
    """One placement and what came of it, for operators. Predicted and actual seconds count from the
    submission."""
    attempt = decision.attempt
    return {
        "request_id": decision.request_id,
        "attempt": attempt.number,
        "decided_at": _rounded(decision.decided_at),
        "prompt_tokens": decision.num_prompt_tokens,
        "decode_worker": attempt.decode_worker,
        "prefill_worker": attempt.prefill_worker,
        "reason": attempt.placement,
        **_predictions(attempt),
        "actual": {
            "first_token_s": _rounded(_after(attempt.submitted_s, attempt.first_token_s)),
            "second_token_s": _rounded(_after(attempt.submitted_s, attempt.second_token_s)),
        },
        "end": attempt.end,
    }


def placement_text(report: RequestReport) -> str:
    """The workers of a request's last attempt in one line, with the seconds that were predicted until its
    second token; empty before it has one."""
    if not report.attempts:
        return ""
    last = report.attempts[-1]
    prefill = "local" if last.prefill_worker is None else last.prefill_worker
    seconds = "" if last.predicted is None else f";predicted={last.predicted.second_token_s:.4f}"
    return f"decode={last.decode_worker};prefill={prefill}{seconds}"


def timings_json(report: RequestReport) -> dict[str, Any]:
    """What the client of the request is told: no message, no reason and no address, since those speak of the
    deployment and of others' load."""
    return {
        "request_id": report.request_id,
        **_milestones(report),
        "num_attempts": report.num_attempts,
        "attempts": [_attempt(attempt) for attempt in report.attempts],
    }


def log_fields(report: RequestReport) -> dict[str, Any]:
    """One request in one line: flat, without what is unknown."""
    origin = report.origin
    last = report.attempts[-1] if report.attempts else None
    timings = report.timings
    fields = {
        "request_id": report.request_id,
        "client_request_id": origin.client_request_id or None,
        "trace_id": None if origin.trace is None else origin.trace.trace_id,
        "answer_id": origin.answer_id or None,
        "api": origin.api or None,
        "model": origin.model or None,
        "outcome": report.outcome,
        "error": report.message,
        "attempts": report.num_attempts,
        "recoveries": ",".join(f"{cause}:{count}" for cause, count in report.recoveries.items()) or None,
        **({} if last is None else _log_attempt(last)),
        "prompt_tokens": report.num_prompt_tokens,
        "output_tokens": report.num_output_tokens,
        **({} if timings is None else _log_timings(timings)),
        **_milestones(report),
        "ended_s": _rounded(report.ended_s),
    }
    return {name: value for name, value in fields.items() if value is not None}


def span_attributes(report: RequestReport) -> Attributes:
    """What the span of a request is told at its end."""
    timings = report.timings
    return {
        "pdserve.request_id": report.request_id,
        "pdserve.client_request_id": report.origin.client_request_id,
        "pdserve.choice": report.origin.choice,
        "pdserve.attempts": report.num_attempts,
        "pdserve.cached_tokens": 0 if timings is None else max(_cached(timings).values()),
        "gen_ai.request.model": report.origin.model,
        "gen_ai.usage.input_tokens": report.num_prompt_tokens or 0,
        "gen_ai.usage.output_tokens": report.num_output_tokens,
    }


def _milestones(report: RequestReport) -> dict[str, float | None]:
    return {
        "first_token_s": _rounded(report.first_token_s),
        "second_token_s": _rounded(report.second_token_s),
        "last_token_s": _rounded(report.last_token_s),
    }


def _full_attempt(attempt: AttemptReport) -> dict[str, Any]:
    parts = _attempt(attempt) | {"placement": attempt.placement, "message": attempt.message}
    parts |= {"second_token_s": _rounded(attempt.second_token_s), **_predictions(attempt)}
    if attempt.timings is not None and parts["transfer"] is not None:
        parts["transfer"]["reason"] = attempt.timings.transport_reason
    return parts


def _attempt(attempt: AttemptReport) -> dict[str, Any]:
    timings = attempt.timings
    return {
        "number": attempt.number,
        "decode_worker": attempt.decode_worker,
        "prefill_worker": attempt.prefill_worker,
        "submitted_s": _rounded(attempt.submitted_s),
        "prefill_queue_s": None if timings is None else _rounded(timings.queue_s),
        "prefill_s": None if timings is None else _rounded(timings.prefill_s),
        "cached_tokens": None if timings is None else _cached(timings),
        "transfer": None if timings is None else _transfer(timings),
        "first_token_s": _rounded(attempt.first_token_s),
        "ended_s": _rounded(attempt.ended_s),
        "end": attempt.end,
    }


def _predictions(attempt: AttemptReport) -> dict[str, Any]:
    runner_up = attempt.runner_up
    return {
        "predicted": None if attempt.predicted is None else _prediction(attempt.predicted),
        "runner_up": None
        if runner_up is None
        else {
            "decode_worker": runner_up.decode,
            "prefill_worker": runner_up.prefill,
            "predicted": _prediction(runner_up.predicted),
        },
    }


def _prediction(predicted: Prediction) -> dict[str, float | None]:
    return {
        "first_token_s": _rounded(predicted.first_token_s),
        "second_token_s": _rounded(predicted.second_token_s),
        "harm_s": _rounded(predicted.harm_s),
    }


def _after(start_s: float, at_s: float | None) -> float | None:
    return None if at_s is None else at_s - start_s


def _cached(timings: RequestTimings) -> Mapping[str, int]:
    return {
        "prefill": timings.cached_prompt_tokens_prefill,
        "decode": timings.cached_prompt_tokens_decode,
    }


def _transfer(timings: RequestTimings) -> dict[str, Any] | None:
    """None where no KV travels. Hidden and exposed time are known when all of it is verified."""
    if not timings.transport:
        return None
    whole = timings.transfer_is_whole
    return {
        "transport": timings.transport,
        "bytes": timings.transfer_bytes,
        "is_whole": whole,
        "hidden_s": _rounded(timings.transfer_hidden_s) if whole else None,
        "exposed_s": _rounded(timings.transfer_exposed_s) if whole else None,
    }


def _log_attempt(attempt: AttemptReport) -> dict[str, Any]:
    return {
        "decode_worker": attempt.decode_worker,
        "prefill_worker": attempt.prefill_worker,
        "submitted_s": _rounded(attempt.submitted_s),
    }


def _log_timings(timings: RequestTimings) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "cached_tokens_prefill": timings.cached_prompt_tokens_prefill,
        "cached_tokens_decode": timings.cached_prompt_tokens_decode,
        "prefill_queue_s": _rounded(timings.queue_s),
        "prefill_s": _rounded(timings.prefill_s),
    }
    transfer = _transfer(timings)
    if transfer is not None:
        fields["transport"] = transfer["transport"]
        fields["transfer_bytes"] = transfer["bytes"]
        fields["transfer_hidden_s"] = transfer["hidden_s"]
        fields["transfer_exposed_s"] = transfer["exposed_s"]
    return fields


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name.value,
        "attempt": stage.attempt,
        "start_s": _rounded(stage.start_s),
        "end_s": _rounded(stage.end_s),
    }


def _rounded(seconds: float | None) -> float | None:
    """To microseconds."""
    return None if seconds is None else round(seconds, 6)
