"""`make faults`: every fault at every state of the protocol, on the real system.

python -m tests.faults.matrix [--rounds N] [--rows ROW ...] [--output FILE]

A process that dies five times in a row is given up, as it should be, so every few kills the system is ended
and started anew, which is itself part of what is tested.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions
from tests.faults.cancels import Cancels, cancel
from tests.faults.head import lose_head
from tests.faults.islands import why_not
from tests.faults.network_cut import cut_while_under_way, system_on_islands
from tests.faults.poison import poison, poisonable_system
from tests.faults.rehearsal import Case, Rehearsal, Run, rehearsal
from tests.faults.rows import cases
from tests.ray_cluster import ROOT, private_pdserve
from tests.small_models import SmallModel, make_model
from tests.small_tokenizers import save_chat_folder

OUTPUT = ROOT / "benchmarks" / "results" / "faults-cpu.json"
HEAD_AWAY_S = 300.0
MAX_DEATHS_PER_SYSTEM = 3
"""Of one process; with the next but one it would be given up."""


def main() -> int:
    """0 when nothing was lost, wrong or left in any run."""
    options = _options()
    torch.set_num_threads(1)
    wanted = [case for case in cases() if not options.rows or case.row in options.rows]
    runs: list[Run] = []
    for round_number in range(options.rounds):
        todo = [replace(case, seed=1000 * round_number + case.seed) for case in wanted]
        for run in run_all(todo):
            runs.append(run)
            say(run)
            save(options.output, runs)
    if not options.rows or "cut" in options.rows:
        runs += run_network_cut(options.rounds)
    if not options.rows or "poison" in options.rows:
        runs += run_poison(options.rounds)
    save(options.output, runs)
    if not options.rows or "head" in options.rows:
        runs += run_head(options.rounds)
        save(options.output, runs)
    cancels = None
    if not options.rows or "client" in options.rows:
        cancels = run_cancels()
        save(options.output, runs, cancels)
    is_good = cancels is None or not (cancels.num_wrong_tokens or cancels.num_leaked_blocks)
    return 0 if is_good and all(run.is_good for run in runs) else 1


@contextlib.contextmanager
def small_chat_model() -> Iterator[SmallModel]:
    """For as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="pdserve-faults-") as folder:
        model = make_model("llama", Path(folder) / "model", vocab_size=420)
        save_chat_folder(model.folder)
        yield model


def run_all(todo: Sequence[Case]) -> Iterator[Run]:
    """Through as many systems as it takes."""
    with small_chat_model() as model:
        for group in _groups(todo):
            while group:
                with private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
                    for run in _run_group(system, group):
                        yield run
                        group = group[1:]


def run_network_cut(rounds: int) -> Iterator[Run]:
    """On a cluster in network namespaces, where there can be one."""
    if why_not():
        sys.stdout.write(f"skipped: the cut of a real link ({why_not()})\n")
        return
    with small_chat_model() as model, system_on_islands(model) as (system, cluster):
        for seed in range(rounds):
            run = asyncio.run(cut_while_under_way(system, cluster, seed))
            say(run)
            yield run


def run_poison(rounds: int) -> Iterator[Run]:
    """On systems whose workers, replacements included, die of a token."""
    with small_chat_model() as model:
        for _ in range(rounds):
            with poisonable_system(model) as system:
                run = asyncio.run(poison(system))
            say(run)
            yield run


def run_head(rounds: int) -> Iterator[Run]:
    """On systems of their own, whose Ray nobody can bring back."""
    with small_chat_model() as model:
        for _ in range(rounds):
            with private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
                run = asyncio.run(lose_head(system, HEAD_AWAY_S))
            say(run)
            yield run


def run_cancels() -> Cancels:
    """A storm of 1,000, and then one by one."""
    with small_chat_model() as model, private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
        return asyncio.run(cancel(system, num_storm=1000, num_timed=200))


def save(
    file: Path, runs: Sequence[Run], cancels: Cancels | None = None, module: str = "tests.faults.matrix"
) -> None:
    """Write what there is so far, of runs by `module`."""
    content: dict[str, Any] = {"conditions": conditions("faults", module)}
    content["runs"] = [run.as_json() for run in runs]
    if cancels is not None:
        content["cancels"] = cancels.as_json()
    file.write_text(json.dumps(content, indent=1) + "\n")


def _run_group(system: Rehearsal, group: Sequence[Case]) -> Iterator[Run]:
    with asyncio.Runner() as runner:
        for case in group:
            run = runner.run(system.run(case))
            yield run
            if not run.happened:
                return  # what is armed and has not happened would happen in the next run


def _groups(todo: Sequence[Case]) -> Iterator[list[Case]]:
    """In each, no process dies more often than one system can bear."""
    group: list[Case] = []
    deaths: dict[str, int] = {}
    for case in todo:
        if any(deaths.get(name, 0) >= MAX_DEATHS_PER_SYSTEM for name in case.kills):
            yield group
            group, deaths = [], {}
        group.append(case)
        for name in case.kills:
            deaths[name] = deaths.get(name, 0) + 1
    if group:
        yield group


def say(run: Run) -> None:
    """One line."""
    mark = "ok " if run.is_good else "BAD"
    parts = [
        f"{mark} {run.row:15} {run.what}: lost {run.num_lost} of {run.num_requests}",
        f"wrong {run.num_wrong_tokens}, leaked {run.num_leaked_blocks}",
        f"pause {run.longest_pause_s:.2f} s, whole after {run.whole_after_s:.1f} s",
        *([] if run.happened else ["DID NOT HAPPEN"]),
        *run.problems[:3],
    ]
    sys.stdout.write(", ".join(parts) + "\n")
    sys.stdout.flush()


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="how often the whole matrix is run")
    parser.add_argument("--rows", nargs="*", help="only these rows of tests/faults/rows.py")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the results are written")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
