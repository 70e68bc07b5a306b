"""Generate docs/faults.md from the results of `make faults`, `make scale-storm` and `make soak`.

python -m tools.make_faults_docs            write it
python -m tools.make_faults_docs --check    fail when the committed page is not what would be written
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """\
# Faults: what was tried, and what came of it

The rows of the hand-off's fault table, provoked on the real system: processes on Ray, real sockets,
requests of the official client under way. [Game days](game-days.md) says how to do the same to yours. In
each run eight requests or more are sent while the fault happens; afterwards all processes check their
books, and the same requests run again without faults, which gives the right tokens. A request is lost when
its client gets an error or too few tokens. The pause is the longest that any client of the run saw between
two events of its stream, or before the first; whole again is everything, replacements included, in service
and at rest.

This page is generated from [the results](../benchmarks/results) by `tools/make_faults_docs.py`; do not edit
it.
"""
TABLE = """\
| what happens | runs | pause: median, max | whole again: median, max | lost | tokens wrong | blocks leaked |
|---|---|---|---|---|---|---|"""
MEMORY = """\
On CPUs a worker grows until oneDNN has compiled its kernels for the numbers of rows that occur in steps, a
prefill worker more than a decode worker, and that ends: one small layer took 165 MiB for 300 different
numbers, 419 MiB for 1,100, and nothing more for 1,800, all of them twice. Malloc keeps about as much again in
holes between the kernels. A prefill worker of the small model, left alone, had 594 MiB allocated after 1,000
requests with prompts of 30 to 220 tokens and 594 to 602 MiB after each thousand up to 6,000, with the same
number of Python objects (2026-11-28, `mallinfo2` and `gc` in the worker). A worker that has just replaced
another grows again.
"""
CASES = """\
| how it was provoked | runs | pause: max | lost | wrong | leaked | |
|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/faults.md is not what tools/make_faults_docs.py writes: run it", file=sys.stderr)
        return 1
    return 0


def make_page() -> str:
    """The whole page as Markdown."""
    faults, storm, soak = _read("faults-cpu.json"), _read("scale-storm-cpu.json"), _read("soak-cpu.json")
    cancels = faults.get("cancels")
    return "\n".join([HEAD, *_faults(faults), *_cancels(cancels), *_pool_changes(storm), *_soak(soak)])


def _faults(results: Mapping[str, Any]) -> Iterator[str]:
    runs = results.get("runs", [])
    yield f"## By row\n\n{_conditions(results)}\n"
    yield TABLE
    yield from (_row(row, runs) for row in ROWS)
    yield "\n## By state\n"
    yield CASES
    yield from (_case(what, [run for run in runs if run["what"] == what]) for what in _in_order(runs))
    yield ""


def _row(row: str, all_runs: Sequence[Mapping[str, Any]]) -> str:
    text = ROWS[row]
    if row == "client":
        return f"| {text} | [below](#clients-that-go-away) | | | | | |"
    if row in ("scale-in", "rollout"):
        return f"| {text} | [below](#pools-that-change) | | | | | |"
    # Each worker has one port to come back to, so all that are killed are restarted at the same address.
    rows = ("prefill killed", "decode killed") if row == "restarted" else (row,)
    runs = [run for run in all_runs if run["row"] in rows]
    if not runs:
        return f"| {text} | not in these results | | | | | |"
    pauses, wholes = ([run[key] for run in runs] for key in ("longest_pause_s", "whole_after_s"))
    cells = [text, str(len(runs)), _median_and_max(pauses), _median_and_max(wholes)]
    sums = [sum(run[key] for run in runs) for key in ("num_lost", "num_wrong_tokens", "num_leaked_blocks")]
    cells += [f"{sums[0]} of {sum(run['num_requests'] for run in runs)}", str(sums[1]), str(sums[2])]
    return f"| {' | '.join(cells)} |"


def _case(what: str, runs: Sequence[Mapping[str, Any]]) -> str:
    lost, wrong, leaked = (
        str(sum(run[key] for run in runs)) for key in ("num_lost", "num_wrong_tokens", "num_leaked_blocks")
    )
    problems = {problem for run in runs for problem in run["problems"]}
    notes = [] if all(run["happened"] for run in runs) else ["did not happen in every run"]
    notes += [f"{len(problems)} problems, such as: {min(problems)}"] if problems else []
    pause = max(run["longest_pause_s"] for run in runs)
    return f"| {what} | {len(runs)} | {pause:.2f} s | {lost} | {wrong} | {leaked} | {'; '.join(notes)} |"


def _cancels(cancels: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Clients that go away\n"
    if cancels is None:
        yield "Not measured yet.\n"
        return
    yield (
        f"A storm of {cancels['num_cancelled'] + cancels['num_finished']} requests, of which "
        f"{cancels['num_cancelled']} were cancelled at random phases: {cancels['num_wrong_tokens']} answers "
        f"wrong beside it, {cancels['num_leaked_blocks']} blocks leaked. One at a time, from the client's "
        "close until no block is held (asked over HTTP, so some milliseconds are the question's):\n"
    )
    yield "| side | cancels | median | p99 | max |\n|---|---|---|---|---|"
    for side in ("prefill", "decode"):
        times_s = cancels[f"{side}_free_s"]
        shown = [statistics.median(times_s), _percentile(times_s, 99), max(times_s)]
        yield f"| {side} workers | {len(times_s)} | {' | '.join(f'{1000 * s:.0f} ms' for s in shown)} |"
    yield ""


def _pool_changes(results: Mapping[str, Any]) -> Iterator[str]:
    runs = results.get("runs", [])
    num_requests, lost, wrong, leaked = (
        sum(run[key] for run in runs)
        for key in ("num_requests", "num_lost", "num_wrong_tokens", "num_leaked_blocks")
    )
    yield f"## Pools that change\n\n{_conditions(results)}\n"
    if runs:
        yield (
            f"Eight clients that never stop asking, while workers leave and come: {len(runs)} changes, "
            f"{num_requests} requests, {lost} lost, {wrong} tokens wrong, {leaked} blocks leaked.\n"
        )
        yield CASES
        yield from (_case(what, [run for run in runs if run["what"] == what]) for what in _in_order(runs))
        yield ""


def _soak(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Soak\n"
    if not results:
        yield "Not measured yet."
        return
    yield f"{_conditions(results)}\n"
    outcomes = ", ".join(f"{count} {name}" for name, count in results["outcomes"].items())
    yield (
        f"{results['minutes']:g} minutes of mixed load with {results['num_faults']} faults: "
        f"{results['num_requests']} requests ({outcomes}); unaccounted for: {results['num_unaccounted']}, "
        f"wrong tokens: {results['num_wrong_tokens']}, blocks leaked: {results['num_leaked_blocks']}.\n"
    )
    yield "| process | what | after the first fifth | at the end |\n|---|---|---|---|"
    for name, first, last in results["growth"]:
        process, _, what = name.partition(" ")
        yield f"| {process} | {what} | {first} | {last} |"
    yield f"\n{MEMORY}"


def _conditions(results: Mapping[str, Any]) -> str:
    if not results:
        return "Not measured yet."
    found = results["conditions"]
    return (
        f"Commit {found['commit'][:7]}, {found['measured_at'][:10]}, {found['hardware']['cores']} cores of "
        f"{found['hardware']['cpu']}; `{found['command'].strip()}`. {found.get('note', '')}".rstrip()
    )


def _in_order(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["what"] for run in runs))


def _median_and_max(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s"


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def _read(name: str) -> dict[str, Any]:
    file = RESULTS / name
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content


if __name__ == "__main__":
    sys.exit(main())
