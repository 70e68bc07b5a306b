"""What a run adds up to, in the words of the load generator."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from load_generator.records import Record
from load_generator.report import Result
from load_generator.summary import Distribution, Slo, summarise
from pdserve.contract.ids import WorkerId
from simulator.attempt import Course
from simulator.batch import Numbers
from simulator.system import Finished

SCHEMA = "pdserve-simulate/1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run's records and what only the simulator knows."""

    result: Result
    prefix_hit_rate: float
    """Of the prompt tokens of all requests served, what their first attempt found cached where they were
    computed."""
    num_preemptions: int
    prefill_busy_share: float | None
    """Of the prefill workers' time until the last request ended; None when there are none."""
    virtual_s: float
    wall_s: float

    @property
    def speed(self) -> float:
        """How many times as fast as real time."""
        return self.virtual_s / max(self.wall_s, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Flat, for programs: what is asked for most often first, the whole summary last."""
        summary = self.result.summary
        return {
            "schema": SCHEMA,
            "name": self.result.name,
            "goodput_rps": summary.goodput,
            "good_share": summary.good_share,
            "offered_rps": summary.offered_rate,
            "ttft_p50_ms": _percentile(summary.time_to_first_token, 50),
            "ttft_p90_ms": _percentile(summary.time_to_first_token, 90),
            "ttft_p99_ms": _percentile(summary.time_to_first_token, 99),
            "tpot_p50_ms": _percentile(summary.time_per_output_token, 50),
            "tpot_p90_ms": _percentile(summary.time_per_output_token, 90),
            "itl_p50_ms": _percentile(summary.inter_token, 50),
            "itl_p99_ms": _percentile(summary.inter_token, 99),
            "prefix_hit_rate": self.prefix_hit_rate,
            "num_preemptions": self.num_preemptions,
            "prefill_busy_share": self.prefill_busy_share,
            "virtual_s": self.virtual_s,
            "wall_s": self.wall_s,
            "times_real_time": self.speed,
            "settings": self.result.settings,
            "slo": asdict(self.result.slo),
            "summary": summary.as_json(),
        }


def outcome_of(finished: Finished, slo: Slo, name: str, settings: Mapping[str, Any]) -> Outcome:
    """Of all requests, those that were refused included."""
    ends = {worker_id: worker.log.ends() for worker_id, worker in finished.decode.items()}
    message_s = finished.system.timing.message_s
    records = [_record(course, ends, message_s) for course in finished.courses]
    summary = summarise(records, slo)
    busy_s = [worker.busy_s for worker in finished.prefill.values()]
    served = [record for record in records if record.succeeded]
    return Outcome(
        result=Result(name, dict(settings), slo, summary, records),
        prefix_hit_rate=sum(record.num_cached_tokens for record in served)
        / max(1, sum(record.num_prompt_tokens for record in served)),
        num_preemptions=sum(worker.num_preemptions for worker in finished.decode.values()),
        prefill_busy_share=sum(busy_s) / len(busy_s) / finished.virtual_s if busy_s else None,
        virtual_s=finished.virtual_s,
        wall_s=finished.wall_s,
    )


def _record(course: Course, ends: Mapping[WorkerId, Numbers], message_s: float) -> Record:
    planned = course.request.planned
    record = Record(course.request.index, planned, sent_at=planned.due_s, error=course.error)
    for attempt in course.attempts:
        if attempt.first_token_at is not None:
            record.token_times.append(attempt.first_token_at + message_s)
        if attempt.left_step is not None:
            steps = ends[attempt.decode][attempt.joined_step : attempt.left_step]
            record.token_times += (steps + message_s).tolist()
    if course.error is None:
        record.ended_at = record.token_times[-1]
        record.num_prompt_tokens = planned.num_prompt_tokens
        record.num_output_tokens = len(record.token_times)
        record.num_cached_tokens = course.attempts[0].num_cached
    return record


def _percentile(of: Distribution | None, percent: int) -> float | None:
    return None if of is None else of.percentiles_ms[percent]
