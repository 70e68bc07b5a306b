"""Write the tables and plots of docs/when-not-to-split.md from the results of `benchmarks.splitting`.

python -m tools.make_splitting_docs            write them
python -m tools.make_splitting_docs --check    fail when the committed ones are not what would be written

The page's words are written by hand; what stands between a comment with a part's name and the next comment
is generated.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.replay import NOT_OF_THE_SYSTEM
from benchmarks.splitting_results import SWEPT_SLO, common_rates, knee, knee_of
from tools import splitting_plots

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "when-not-to-split.md"
RESULTS = ROOT / "benchmarks" / "results" / "splitting-cpu.json"

Results = Mapping[str, Any]
Run = Mapping[str, Any]

NOT_MEASURED = "Not measured yet."
TIMES = {
    "first token p50": ("first_token_ms", "p50"),
    "first token p99": ("first_token_ms", "p99"),
    "second token p50": ("second_token_ms", "p50"),
    "inter-token p50": ("inter_token_ms", "p50"),
    "inter-token p99": ("inter_token_ms", "p99"),
}
SLO_WORDS = {
    "ttft_ms": "the first token within {:g} ms",
    "tpot_ms": "the further ones on average within {:g} ms each",
    "itl_ms": "every further one within {:g} ms",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    results = read_results()
    page = filled(PAGE.read_text(), results)
    if not check:
        PAGE.write_text(page)
        splitting_plots.write(results)
    elif PAGE.read_text() != page or not splitting_plots.are_of(results):
        print(f"{PAGE.name} is not what tools/make_splitting_docs.py writes: run it", file=sys.stderr)
        return 1
    return 0


def read_results() -> dict[str, Any]:
    """Those that are committed; {}: there are none."""
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return content


def filled(page: str, results: Results) -> str:
    """The page with its generated parts as `results` say. Raises KeyError for a part that is not known."""

    def part(match: re.Match[str]) -> str:
        lines = PARTS[match["name"]](results) if results else [NOT_MEASURED]
        return "\n".join([match["begin"], *lines, match["end"]])

    return re.sub(
        r"(?P<begin><!-- generated: (?P<name>[\w ]+) -->)\n.*?(?P<end><!-- end -->)",
        part,
        page,
        flags=re.DOTALL,
    )


def _setting(results: Results) -> Iterator[str]:
    yield "| arrangement | |\n|---|---|"
    yield from (f"| {name} | {each['text']} |" for name, each in results["arrangements"].items())
    yield "\n| workload | requests of a run | prompt tokens | output tokens | shared prompt |"
    yield "|---|---|---|---|---|"
    for name, facts in results["workloads"].items():
        lengths = f"{facts['mean_prompt_tokens']:.0f} | {facts['mean_output_tokens']:.1f}"
        yield f"| {name} | {facts['num_requests']} | {lengths} | {facts['shared_share']:.0%} |"
    yield "\n| good: | |\n|---|---|"
    yield from (f"| {name} | {_slo_words(slo)} |" for name, slo in results["slos"].items())
    yield f"\n{_conditions(results['conditions'])}"


def _knees(results: Results) -> Iterator[str]:
    names = list(results["arrangements"])
    other = next(slo for slo in results["slos"] if slo != SWEPT_SLO)
    yield f"| workload | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for workload in results["workloads"]:
        cells = []
        for name in names:
            second = knee_of(results["sweeps"], workload, name, other)
            first = knee(results["sweeps"], workload, name)
            cells.append(f"{first:.1f} ({'none' if second is None else f'{second:.1f}'})")
        yield f"| {workload} | {' | '.join(cells)} |"
    yield "\n![Share of good requests against the rate, for each workload](splitting-sweeps.svg)"


def _same_rates(results: Results) -> Iterator[str]:
    slos = [f"goodput: {slo}" for slo in results["slos"]]
    heads = ["workload, requests/s", "arrangement", *slos, *TIMES, "cached", "CPU", "computing"]
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for workload in results["workloads"]:
        for which, rate in _rates(results, workload).items():
            for name in results["arrangements"]:
                runs = _runs(results, workload, which, name)
                if runs:
                    cells = [f"{workload}, {which}: {rate:.3g}", name, *_cells(runs, rate)]
                    yield f"| {' | '.join(cells)} |"
    yield "\n![Times of every run, by workload, rate and arrangement](splitting-latency.svg)"


def _cells(runs: Sequence[Run], rate: float) -> Iterator[str]:
    slos = runs[0]["good_share"]
    yield from (_spread([rate * run["good_share"][slo] for run in runs], "{:.1f}") for slo in slos)
    yield from (_spread([run[key][at] for run in runs], "{:.0f}") for key, at in TIMES.values())
    yield f"{median(run['cached_share'] for run in runs):.0%}"
    yield f"{1000 * median(_cpu_s(run) for run in runs):.0f}"
    yield ", ".join(
        f"{worker} {median(run['stepping'][worker] for run in runs):.0%}" for worker in runs[0]["stepping"]
    )


def _cpu_s(run: Run) -> float:
    """Of router and workers, for a request."""
    cores = sum(used for name, used in run["cores"].items() if name not in NOT_OF_THE_SYSTEM)
    used_s: float = cores * run["wall_s"]
    return used_s / run["num_requests"]


def _ratios(results: Results) -> Iterator[str]:
    ours, *others = results["arrangements"]
    heads = ["workload, rate", "against", f"goodput: {SWEPT_SLO}", *TIMES]
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for workload in results["workloads"]:
        for which in _rates(results, workload):
            for other in others:
                pairs = _pairs(results, workload, which, ours, other)
                if pairs:
                    yield f"| {workload}, {which} | {other} | {' | '.join(_compared(pairs))} |"


def _compared(pairs: Sequence[tuple[Run, Run]]) -> Iterator[str]:
    goodput = [(mine["good_share"][SWEPT_SLO], its["good_share"][SWEPT_SLO]) for mine, its in pairs]
    yield _ratio(goodput, sum(mine > its for mine, its in goodput))
    for key, at in TIMES.values():
        times = [(mine[key][at], its[key][at]) for mine, its in pairs]
        yield _ratio(times, sum(mine < its for mine, its in times))


def _ratio(pairs: Sequence[tuple[float, float]], num_better: int) -> str:
    ratios = [mine / its if its else float("inf") for mine, its in pairs]
    return f"{median(ratios):.2f} ({num_better} of {len(pairs)})"


PARTS = {"setting": _setting, "knees": _knees, "same rates": _same_rates, "ratios": _ratios}


def _pairs(results: Results, workload: str, which: str, ours: str, other: str) -> list[tuple[Run, Run]]:
    """The runs of each repetition that both arrangements have."""
    theirs = {run["repetition"]: run for run in _runs(results, workload, which, other)}
    mine = _runs(results, workload, which, ours)
    return [(run, theirs[run["repetition"]]) for run in mine if run["repetition"] in theirs]


def _runs(results: Results, workload: str, which: str, name: str) -> list[Run]:
    key = (workload, which, name)
    return [run for run in results["runs"] if (run["workload"], run["rate"], run["arrangement"]) == key]


def _rates(results: Results, workload: str) -> dict[str, float]:
    return common_rates(results["sweeps"], workload, list(results["arrangements"]))


def _spread(values: Sequence[float], form: str) -> str:
    least, middle, most = (form.format(value) for value in (min(values), median(values), max(values)))
    return f"{middle} ({least} to {most})"


def _slo_words(slo: Mapping[str, float | None]) -> str:
    return ", ".join(SLO_WORDS[key].format(limit) for key, limit in slo.items() if limit is not None)


def _conditions(sessions: Sequence[Mapping[str, Any]]) -> str:
    last = sessions[-1]
    commits = ", ".join(dict.fromkeys(session["commit"][:7] for session in sessions))
    hardware = last["hardware"]
    return (
        f"Commit {commits}, {last['measured_at'][:10]}, {hardware['cores']} cores of {hardware['cpu']}, "
        f"torch {last['versions']['torch']}; `{last['command'].strip()}`."
    )


if __name__ == "__main__":
    sys.exit(main())
