"""The results of runs as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from load_generator.records import Record
from load_generator.summary import PERCENTILES, Distribution, Slo, Summary

SCHEMA = "pdserve-bench/1"
_HEADS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
LATE_MS = 20.0
"""A generator that is later than this at p99 is told so: its machine may be too busy."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run with what it was asked to do."""

    name: str
    settings: dict[str, Any]
    slo: Slo
    summary: Summary
    records: Sequence[Record]

    def as_json(self, with_requests: bool) -> dict[str, Any]:
        content: dict[str, Any] = {
            "name": self.name,
            "settings": self.settings,
            "slo": asdict(self.slo),
            "summary": self.summary.as_json(),
        }
        if with_requests:
            content["requests"] = [_request(record) for record in self.records]
        return content


def as_json(
    results: Sequence[Result], conditions: dict[str, Any], with_requests: bool = True
) -> dict[str, Any]:
    """Everything, self-describing. Times of single requests are milliseconds since the start of their run."""
    runs = [result.as_json(with_requests) for result in results]
    return {"schema": SCHEMA, "conditions": conditions, "runs": runs}


def table(result: Result) -> str:
    """One run."""
    summary = result.summary
    lines = [
        f"{result.name}: {summary.num_succeeded} of {summary.num_requests} requests succeeded "
        f"in {summary.duration_s:.1f} s",
        *(f"  {count} x {kind}" for kind, count in sorted(summary.errors.items())),
        f"  offered {summary.offered_rate:.3g} requests/s, served {summary.request_rate:.3g}/s, "
        f"{summary.prompt_tokens_per_s:.4g} prompt and {summary.output_tokens_per_s:.4g} output tokens/s, "
        f"{summary.cached_share:.0%} of the prompt tokens from a cache",
        f"  {_slo_words(result.slo)}: {summary.good_share:.1%} of the requests, "
        f"goodput {summary.goodput:.3g} requests/s",
        "",
        f"  {'ms':<21}" + "".join(f"{head:>10}" for head in _HEADS),
    ]
    rows = {
        "time to first token": summary.time_to_first_token,
        "time to second token": summary.time_to_second_token,
        "time per output token": summary.time_per_output_token,
        "inter-token": summary.inter_token,
        "end to end": summary.end_to_end,
        "sent late by": summary.send_delay,
    }
    lines += [_row(name, distribution) for name, distribution in rows.items()]
    delay = summary.send_delay
    if delay is not None and delay.percentiles_ms[99] > LATE_MS:
        lines.append(
            f"  the generator itself was late by {delay.percentiles_ms[99]:.0f} ms at p99: give it a core of "
            "its own, or another machine"
        )
    return "\n".join(lines)


def sweep_table(results: Sequence[Result]) -> str:
    """One line per run, by rate."""
    head = ("requests/s", "good", "goodput/s", "ttft p50", "ttft p99", "tpot p50", "itl p99", "errors")
    rows = [[*_sweep_row(result.summary)] for result in sorted(results, key=lambda r: r.summary.offered_rate)]
    widths = [max(len(row[place]) for row in [list(head), *rows]) for place in range(len(head))]
    lines = [list(head), *rows]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _sweep_row(summary: Summary) -> list[str]:
    def at(distribution: Distribution | None, percent: int) -> str:
        return "-" if distribution is None else f"{distribution.percentiles_ms[percent]:.0f}"

    return [
        f"{summary.offered_rate:.3g}",
        f"{summary.good_share:.1%}",
        f"{summary.goodput:.3g}",
        at(summary.time_to_first_token, 50),
        at(summary.time_to_first_token, 99),
        at(summary.time_per_output_token, 50),
        at(summary.inter_token, 99),
        str(sum(summary.errors.values())),
    ]


def _row(name: str, distribution: Distribution | None) -> str:
    if distribution is None:
        return f"  {name:<21}         -"
    values = (distribution.mean_ms, *distribution.percentiles_ms.values(), distribution.max_ms)
    return f"  {name:<21}" + "".join(f"{value:>10.1f}" for value in values)


def _slo_words(slo: Slo) -> str:
    given = [(name.removesuffix("_ms"), limit) for name, limit in asdict(slo).items() if limit is not None]
    return "within " + ", ".join(f"{name} {limit:g} ms" for name, limit in given) if given else "succeeded"


def _request(record: Record) -> dict[str, Any]:
    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 3)

    return {
        "due": ms(record.planned.due_s),
        "sent": ms(record.sent_at),
        "tokens": [ms(at) for at in record.token_times],
        "ended": ms(record.ended_at),
        "in": record.num_prompt_tokens,
        "out": record.num_output_tokens,
        "cached": record.num_cached_tokens,
        "error": record.error,
    }
