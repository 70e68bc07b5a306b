"""The results of `benchmarks.splitting`: their file, what they say, and what they still lack."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replay import Workload
from benchmarks.splitting_plan import RATES, Plan, first_rate
from load_generator.sweep import Tried, find_knee, next_rate

SWEPT_SLO = "pace"
MIN_GOOD_SHARE = 0.9
OF_LOWEST_KNEE = 0.8

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class MissingRun:
    """One that is to be measured."""

    workload: Workload
    rate: str
    """Of `RATES`."""
    requests_per_s: float
    repetition: int
    arrangement: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells this run from all others."""
        return {
            "workload": self.workload.name,
            "arrangement": self.arrangement,
            "rate": self.rate,
            "repetition": self.repetition,
        }


class Results:
    """The file of all runs so far."""

    def __init__(self, path: Path | None, plan: Plan, workloads: Sequence[Workload]) -> None:
        """Goes on with what `path` holds; None: nothing is written. Raises SystemExit when that is of another
        plan."""
        self._path, self._plan, self._workloads = path, plan, workloads
        described = json.loads(json.dumps(plan.describe(workloads)))
        found = json.loads(path.read_text()) if path is not None and path.exists() else None
        if found is not None and {key: found.get(key) for key in described} != described:
            raise SystemExit(f"{path} holds runs of another plan: move it away, or choose another --json")
        self.content: dict[str, Any] = found or {"conditions": [], **described, "sweeps": [], "runs": []}

    @property
    def sweeps(self) -> list[dict[str, Any]]:
        return self.content["sweeps"]

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.content["runs"]

    @property
    def is_complete(self) -> bool:
        return all(
            self.next_sweep_rate(workload, name) is None
            for workload in self._workloads
            for name in self._plan.arrangements
        ) and not any(self.missing())

    def next_sweep_rate(self, workload: Workload, arrangement: str) -> float | None:
        """None: the knee is found."""
        tried = sweep_of(self.sweeps, workload.name, arrangement)
        return next_rate(tried, first_rate(workload), MIN_GOOD_SHARE, self._plan.max_sweep_runs)

    def missing(self) -> Iterator[MissingRun]:
        """All runs at common rates that are not there yet, in their order: arrangements in turns, and every
        workload once before the next repetition. The sweeps have ended."""
        done = [
            {key: run[key] for key in ("workload", "arrangement", "rate", "repetition")} for run in self.runs
        ]
        for repetition in range(self._plan.repetitions):
            for workload in self._workloads:
                rates = common_rates(self.sweeps, workload.name, self._plan.arrangements)
                for which, requests_per_s in rates.items():
                    for name in self._plan.arrangements:
                        run = MissingRun(workload, which, requests_per_s, repetition, name)
                        if run.key not in done:
                            yield run

    def write(self) -> None:
        if self._path is not None:
            unfinished = self._path.with_suffix(".part")
            unfinished.write_text(_dump(self.content))
            unfinished.replace(self._path)


def common_rates(sweeps: Runs, workload: str, arrangements: Sequence[str]) -> dict[str, float]:
    """The rates at which all arrangements are measured, requests per second."""
    found = [knee(sweeps, workload, name) for name in arrangements]
    return dict(zip(RATES, (round(OF_LOWEST_KNEE * min(found), 2), round(max(found), 2)), strict=True))


def knee(sweeps: Runs, workload: str, arrangement: str) -> float:
    """The highest rate that was good enough; where none was, the lowest one tried."""
    tried = sweep_of(sweeps, workload, arrangement)
    return knee_of(sweeps, workload, arrangement, SWEPT_SLO) or min(each.rate for each in tried)


def knee_of(sweeps: Runs, workload: str, arrangement: str, slo: str) -> float | None:
    """The highest rate that was good enough by an SLO, of those that were tried; None: none was."""
    return find_knee(sweep_of(sweeps, workload, arrangement, slo), MIN_GOOD_SHARE).good_rate


def sweep_of(sweeps: Runs, workload: str, arrangement: str, slo: str = SWEPT_SLO) -> list[Tried]:
    mine = [run for run in sweeps if (run["workload"], run["arrangement"]) == (workload, arrangement)]
    return [Tried(run["rate"], run["good_share"][slo]) for run in mine]


def _dump(content: Mapping[str, Any]) -> str:
    """JSON with a line for each run."""
    runs = {key: content[key] for key in ("sweeps", "runs")}
    head = json.dumps({key: value for key, value in content.items() if key not in runs}, indent=1)
    lists = (
        f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]" for key, found in runs.items()
    )
    return head.removesuffix("\n}") + ",\n" + ",\n".join(lists) + "\n}\n"
