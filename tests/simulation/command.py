"""The command line: runs ranges of seeds, prints what failed and what was covered, writes the results."""

import argparse
import gc
import json
import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.coverage import POSSIBLE, Coverage
from tests.simulation.run import Report, run_seed

SEEDS_OF_A_FULL_RUN = 20_000
HITS_OF_A_FULL_RUN = 50
"""How often every possible combination must be met there; shorter runs need their share of it."""

MAX_SEED_S = 30
"""Real time after which a seed is given up: it goes round in circles."""


@dataclass(slots=True)
class Outcome:
    """What one process needs to know of a seed that ran in another."""

    seed: int
    failures: list[str]
    coverage: Coverage
    ends: Counter[str]
    num_faults: int
    num_events: int
    virtual_s: float
    cpu_s: float = 0.0
    """Collecting its garbage included."""


@dataclass(slots=True)
class Summary:
    """Of all seeds so far."""

    num_seeds: int = 0
    num_requests: int = 0
    num_faults: int = 0
    fewest_faults: int = sys.maxsize
    fewest_requests: int = sys.maxsize
    num_events: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    coverage: Coverage = field(default_factory=Coverage)
    ends: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        num_requests = outcome.ends.total()
        self.num_seeds += 1
        self.num_requests += num_requests
        self.num_faults += outcome.num_faults
        self.num_events += outcome.num_events
        self.virtual_s += outcome.virtual_s
        self.cpu_s += outcome.cpu_s
        self.coverage.hits.update(outcome.coverage.hits)
        self.ends.update(outcome.ends)
        if outcome.failures:
            self.failed.append(outcome)
        else:
            self.fewest_faults = min(self.fewest_faults, outcome.num_faults)
            self.fewest_requests = min(self.fewest_requests, num_requests)

    @property
    def min_hits(self) -> int:
        return HITS_OF_A_FULL_RUN * self.num_seeds // SEEDS_OF_A_FULL_RUN

    @property
    def line(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        return (
            f"{self.num_seeds} seeds: {len(self.failed)} failed; {self.num_requests} requests ({ends}); "
            f"{self.num_faults} faults, at least {self.fewest_faults} a seed; "
            f"{self.cpu_s / max(1, self.num_seeds):.3f} s of CPU and "
            f"{self.virtual_s / max(1, self.num_seeds):.1f} s of virtual time a seed"
        )


def main(arguments: Sequence[str]) -> int:
    """0 when every seed passed and every possible combination was met often enough."""
    options = _parser().parse_args(arguments)
    if options.events:
        return _show_events(options.seeds)
    began_at = time.monotonic()
    summary = _run_all(options.seeds, options.jobs, options.stop_at_first)
    print(summary.line)
    if options.stop_at_first:
        return _report_failures(summary)
    print(f"\n{summary.coverage.table()}\n")
    status = _report_failures(summary) | _report_missing(summary)
    if options.results is not None:
        _write_results(options.results, arguments, summary, time.monotonic() - began_at)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=_range, default=range(300), help="FIRST:STOP, or one seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--events", action="store_true", help="print every seed's event log")
    parser.add_argument("--stop-at-first", action="store_true", help="end with the first seed that fails")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file")
    return parser


def _range(text: str) -> range:
    first, _, stop = text.partition(":")
    return range(int(first), int(stop) if stop else int(first) + 1)


def _run_all(seeds: range, jobs: int, stop_at_first: bool) -> Summary:
    summary = Summary()
    for outcome in _outcomes(seeds, jobs):
        summary.add(outcome)
        if outcome.failures:
            print(f"seed {outcome.seed}: {outcome.failures[0]}", flush=True)
            if stop_at_first:
                break
        if summary.num_seeds % 1000 == 0:
            print(f"... {summary.line}", flush=True)
    return summary


def _outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        _collect_between_seeds()
        yield from map(run_bounded, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _collect_between_seeds) as pool:
        yield from pool.imap(run_bounded, seeds, chunksize=20)


def _collect_between_seeds() -> None:
    """What was imported stays and nothing outlives its run, so garbage is looked for only after each."""
    gc.collect()
    gc.freeze()
    gc.disable()


def run_bounded(seed: int) -> Outcome:
    """Run a seed in real time that ends, too."""
    began_at = time.process_time()
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, MAX_SEED_S, 1)  # again and again, until it has really ended
    try:
        report = run_seed(seed)
    except _TooSlow:
        report = Report(seed, [f"still running after {MAX_SEED_S} s of real time"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome = Outcome(
        seed,
        report.failures,
        report.coverage,
        Counter({end.value: count for end, count in report.outcomes.items()}),
        report.num_faults,
        report.num_events,
        report.virtual_s,
    )
    del report
    if not gc.isenabled():
        gc.collect()
    outcome.cpu_s = time.process_time() - began_at
    return outcome


class _TooSlow(BaseException):
    """Goes through everything that a simulated system catches."""


def _give_up(number: int, frame: object) -> None:
    raise _TooSlow


def _show_events(seeds: Iterable[int]) -> int:
    failed = False
    for seed in seeds:
        report = run_seed(seed)
        failed |= not report.passed
        for line in report.log.lines():
            print(line)
        print(f"seed {seed}: {'; '.join(report.failures) or 'passed'}; log {report.log.digest()[:16]}")
    return int(failed)


def _report_failures(summary: Summary) -> int:
    """The first failing seed is run again for its events."""
    if not summary.failed:
        return 0
    first = summary.failed[0]
    print(f"\nThe events of seed {first.seed}:\n")
    if "real time" not in first.failures[0]:
        _show_events([first.seed])
    for outcome in summary.failed:
        print(f"seed {outcome.seed}: {'; '.join(outcome.failures)}")
    print(f"\nReproduce with: python -m tests.simulation --seeds {first.seed} --events")
    return 1


def _report_missing(summary: Summary) -> int:
    missing = summary.coverage.missing(summary.min_hits)
    for combination in missing:
        hits = summary.coverage.hits[combination]
        print(f"met {hits} times, not {summary.min_hits}: {' / '.join(combination)}")
    return int(bool(missing))


def _write_results(path: Path, arguments: Sequence[str], summary: Summary, wall_s: float) -> None:
    from benchmarks.conditions import conditions  # here: it takes seconds to import

    hits = summary.coverage.hits
    results = conditions("simulation") | {
        "command": f"python -m tests.simulation {' '.join(arguments)}",
        "seeds": summary.num_seeds,
        "failed": [outcome.seed for outcome in summary.failed],
        "requests": summary.num_requests,
        "fewest_requests_a_seed": summary.fewest_requests,
        "requests_by_end": dict(sorted(summary.ends.items())),
        "faults": summary.num_faults,
        "fewest_faults_a_seed": summary.fewest_faults,
        "events_at_hosts": summary.num_events,
        "virtual_s": round(summary.virtual_s, 1),
        "cpu_s_a_seed": round(summary.cpu_s / summary.num_seeds, 4),
        "wall_s": round(wall_s, 1),
        "fewest_hits_of_a_combination": min(hits[combination] for combination in POSSIBLE),
        "hits": {" / ".join(combination): hits[combination] for combination in POSSIBLE},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
