"""Every placement policy on recorded load, in virtual time, up to where too few requests are good.

    python -m benchmarks.policies TRACE... --json policies.json --plot policies.svg
    python -m benchmarks.policies TRACE --limit 100 --policies round_robin predicted

Each policy serves the same requests on the same simulated workers (docs/simulate.md) at rates that are
raised until less than 90 % of the requests keep the objectives: its knee. Then all serve the rate at which
the best of them has its knee, where the differences are largest: goodput, time to first token, prefix hits.
The hits are compared with those of one LRU cache that has the blocks of all the workers together and sees the
prompts in the order of arrival.
"""

import argparse
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from load_generator.summary import Slo
from load_generator.sweep import Tried, find_knee, next_rate
from load_generator.traces import PlannedRequest, read_trace, scaled
from router.placement.policies import POLICIES
from simulator.outcome import Outcome, outcome_of
from simulator.system import SimulatedSystem, simulate
from simulator.timing import DEVICES, device
from simulator.workload import block_tokens_of

GOOD_SHARE = 0.9
MAX_RUNS = 10


class Bench:
    """One trace on one system."""

    def __init__(self, trace: Path, limit: int | None, system: SimulatedSystem, slo: Slo) -> None:
        self.name = trace.name.removesuffix(".jsonl.gz").removesuffix(".jsonl")
        self._system = system
        self._slo = slo
        self._planned = read_trace(trace, limit)
        self._rate = (len(self._planned) - 1) / self._planned[-1].due_s
        self._served: dict[tuple[str, float], Outcome] = {}

    def measure(self, policies: Sequence[str]) -> dict[str, Any]:
        """Every policy's knee, and all of them at the highest one."""
        first_rate = self._rate
        knees: dict[str, float | None] = {}
        for policy in policies:
            knees[policy] = self._knee(policy, first_rate)
            first_rate = knees[policy] or first_rate
        common_rate = max((rate for rate in knees.values() if rate is not None), default=self._rate)
        bound = self._lru_hit_rate()
        print(f"{self.name}: one LRU hits {bound:.1%}; all at {common_rate:.3g} requests/s")
        return {
            "trace": self.name,
            "requests": len(self._planned),
            "recorded_rps": self._rate,
            "lru_hit_rate": bound,
            "common_rps": common_rate,
            "knees_rps": knees,
            "sweeps": {policy: self._sweep(policy) for policy in policies},
            "at_common_rate": {policy: self._row(policy, common_rate, bound) for policy in policies},
        }

    def _knee(self, policy: str, first_rate: float) -> float | None:
        """The highest rate that was good; None when none was."""
        tried: list[Tried] = []
        while (rate := next_rate(tried, first_rate, GOOD_SHARE, MAX_RUNS)) is not None:
            tried.append(Tried(rate, self._serve(policy, rate).result.summary.good_share))
        return find_knee(tried, GOOD_SHARE).good_rate

    def _serve(self, policy: str, rate: float) -> Outcome:
        if (policy, rate) not in self._served:
            planned = scaled(self._planned, rate / self._rate)
            finished = simulate(planned, replace(self._system, policy=policy))
            finished.check_empty()
            outcome = outcome_of(finished, self._slo, policy, {})
            # The tables need the sums only, and the records of all runs would not fit into memory.
            outcome = replace(outcome, result=replace(outcome.result, records=()))
            self._served[policy, rate] = outcome
            print(
                f"{self.name} {policy} {rate:.3g}/s: {outcome.result.summary.good_share:.1%} good", flush=True
            )
        return self._served[policy, rate]

    def _sweep(self, policy: str) -> list[dict[str, Any]]:
        rates = sorted(rate for name, rate in self._served if name == policy)
        return [self._figures(self._serve(policy, rate), rate) for rate in rates]

    def _row(self, policy: str, rate: float, bound: float) -> dict[str, Any]:
        outcome = self._serve(policy, rate)
        return self._figures(outcome, rate) | {
            "hits_of_lru": outcome.prefix_hit_rate / bound if bound else None
        }

    @staticmethod
    def _figures(outcome: Outcome, rate: float) -> dict[str, Any]:
        keys = ("goodput_rps", "good_share", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "itl_p99_ms")
        content = outcome.as_json()
        more = ("prefix_hit_rate", "num_preemptions", "prefill_busy_share", "times_real_time")
        return {"rps": rate} | {key: content[key] for key in keys + more}

    def _lru_hit_rate(self) -> float:
        """Of the prompt tokens, with the blocks of all workers in one cache."""
        block_tokens = block_tokens_of(self._planned, self._system.block_tokens)
        num_workers = self._system.num_unsplit or self._system.num_prefill + self._system.num_decode
        capacity = num_workers * (self._system.timing.pool_tokens // block_tokens)
        hits = lru_hits(self._planned, block_tokens, capacity)
        return sum(hits) / sum(row.num_prompt_tokens for row in self._planned)


def lru_hits(planned: Sequence[PlannedRequest], block_tokens: int, capacity: int) -> list[int]:
    """Cached prompt tokens of each request. Only whole blocks of prompts are kept; of one prompt the deepest
    block goes first."""
    cache: OrderedDict[int, None] = OrderedDict()  # least recently used first
    hits = []
    for row in planned:
        names = row.prefix_ids[: row.num_prompt_tokens // block_tokens]
        reusable = names[: (row.num_prompt_tokens - 1) // block_tokens]
        num_held = next((place for place, name in enumerate(reusable) if name not in cache), len(reusable))
        hits.append(num_held * block_tokens)
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def table(result: dict[str, Any]) -> str:
    """One trace, as Markdown."""
    lines = [
        f"| {result['trace']} | knee, requests/s | at {result['common_rps']:.3g}/s: good | goodput | "
        "ttft p50 s | ttft p90 s | itl p99 ms | hits | of one LRU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = result["at_common_rate"]
    for policy in sorted(rows, key=lambda name: -rows[name]["good_share"]):
        row, knee = rows[policy], result["knees_rps"][policy]
        share = row["hits_of_lru"]
        lines.append(
            f"| {policy} | {'none' if knee is None else f'{knee:.3g}'} | {row['good_share']:.1%} | "
            f"{row['goodput_rps']:.3g} | "
            f"{row['ttft_p50_ms'] / 1000:.2f} | {row['ttft_p90_ms'] / 1000:.2f} | {row['itl_p99_ms']:.1f} | "
            f"{row['prefix_hit_rate']:.1%} | {'-' if share is None else f'{share:.0%}'} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Goodput against the offered rate, one panel for each trace."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for policy, sweep in result["sweeps"].items():
            rates = [run["rps"] for run in sweep]
            axes.plot(rates, [run["goodput_rps"] for run in sweep], "o-", label=policy, markersize=3)
        axes.set_title(result["trace"])
        axes.set_xlabel("offered, requests/s")
        axes.set_ylabel("goodput, requests/s")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, help="only the first requests of each trace")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--device", choices=list(DEVICES), default="h100-8b")
    parser.add_argument("--prefill", type=int, default=4)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--unsplit", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=5000.0)
    parser.add_argument("--tpot", type=float, default=50.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    slo = Slo(ttft_ms=options.ttft, tpot_ms=options.tpot)
    timing = device(options.device)
    system = SimulatedSystem(timing, "", options.prefill, options.decode, options.unsplit)
    about = {
        **conditions("policies"),
        "slo": asdict(slo),
        "good_share": GOOD_SHARE,
        "device": timing.name,
        "times_from": timing.source,
        "workers": {"prefill": options.prefill, "decode": options.decode, "unsplit": options.unsplit},
    }
    results: list[dict[str, Any]] = []
    for trace in options.traces:
        results.append(Bench(trace, options.limit, system, slo).measure(options.policies))
        print(table(results[-1]), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(about | {"traces": results}, indent=1) + "\n")
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
