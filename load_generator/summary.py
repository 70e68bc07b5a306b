"""What a run's records add up to. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from load_generator.records import Record

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request has to keep to count as good; None: nothing is asked. Milliseconds."""

    ttft_ms: float | None = None
    """Time to first token."""
    tpot_ms: float | None = None
    """Mean time per output token after the first."""
    itl_ms: float | None = None
    """The longest wait between two tokens of the request."""
    e2e_ms: float | None = None
    """End to end."""

    def is_kept(self, record: Record) -> bool:
        """Only requests that succeeded can keep anything."""
        if not record.succeeded:
            return False
        tpot_s = record.time_per_output_token_s or 0.0
        taken = (
            (self.ttft_ms, record.time_to_first_token_s),
            (self.tpot_ms, tpot_s),
            (self.itl_ms, max(record.inter_token_s, default=0.0)),
            (self.e2e_ms, record.end_to_end_s),
        )
        return all(limit_ms is None or seconds * 1000 <= limit_ms for limit_ms, seconds in taken)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of seconds, told in milliseconds; percentiles by linear interpolation."""

    count: int
    mean_ms: float
    percentiles_ms: dict[int, float]
    max_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run."""

    num_requests: int
    num_succeeded: int
    errors: dict[str, int]
    """Kind of error -> how many."""
    duration_s: float
    """From the first request that was due to the last one that ended."""
    offered_rate: float
    """Requests due per second."""
    request_rate: float
    """Requests that succeeded per second."""
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    cached_share: float
    """Of the prompt tokens, as far as the server tells."""
    goodput: float
    """Requests per second that kept the SLO."""
    good_share: float
    """Of all requests, failed ones included."""
    time_to_first_token: Distribution | None
    time_to_second_token: Distribution | None
    time_per_output_token: Distribution | None
    inter_token: Distribution | None
    end_to_end: Distribution | None
    send_delay: Distribution | None
    """How late the generator was. When this is not small, the figures say something about the generator."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(records: Sequence[Record], slo: Slo, skip_s: float = 0.0) -> Summary:
    """Of the requests that were due `skip_s` seconds after the start or later. Raises ValueError when there
    are none."""
    counted = [record for record in records if record.planned.due_s >= skip_s]
    if not counted:
        raise ValueError(f"no request was due after the first {skip_s:g} s")
    good = [record for record in counted if record.succeeded]
    first_s = min(record.planned.due_s for record in counted)
    duration_s = max(max(record.ended_at or 0.0 for record in counted) - first_s, 1e-9)
    due_span_s = max(record.planned.due_s for record in counted) - first_s
    num_kept = sum(slo.is_kept(record) for record in counted)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in good)
    return Summary(
        num_requests=len(counted),
        num_succeeded=len(good),
        errors=dict(Counter(_kind(record) for record in counted if not record.succeeded)),
        duration_s=duration_s,
        offered_rate=(len(counted) - 1) / due_span_s if due_span_s else float("inf"),
        request_rate=len(good) / duration_s,
        output_tokens_per_s=sum(record.num_output_tokens for record in good) / duration_s,
        prompt_tokens_per_s=num_prompt_tokens / duration_s,
        cached_share=sum(record.num_cached_tokens for record in good) / max(1, num_prompt_tokens),
        goodput=num_kept / duration_s,
        good_share=num_kept / len(counted),
        time_to_first_token=_of(good, lambda record: [record.time_to_first_token_s]),
        time_to_second_token=_of(good, lambda record: _given(record.time_to_second_token_s)),
        time_per_output_token=_of(good, lambda record: _given(record.time_per_output_token_s)),
        inter_token=_of(good, lambda record: record.inter_token_s),
        end_to_end=_of(good, lambda record: [record.end_to_end_s]),
        send_delay=_of(counted, lambda record: _given(record.send_delay_s)),
    )


def _of(records: Sequence[Record], seconds: Callable[[Record], list[float]]) -> Distribution | None:
    values = np.array([value for record in records for value in seconds(record)]) * 1000
    if not len(values):
        return None
    percentiles = {percent: float(np.percentile(values, percent)) for percent in PERCENTILES}
    return Distribution(len(values), float(values.mean()), percentiles, float(values.max()))


def _given(seconds: float | None) -> list[float]:
    return [] if seconds is None else [seconds]


def _kind(record: Record) -> str:
    """Without the server's words, which may differ from request to request."""
    if record.error is None:
        return "no tokens" if record.ended_at is not None else "not ended"
    return record.error.partition(":")[0]
