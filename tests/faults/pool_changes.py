"""`make scale-storm`: pools that shrink and grow, drained workers and rollouts, under load that never stops.

python -m tests.faults.pool_changes [--scale-ins N] [--drains N] [--rollouts N] [--output FILE]

Clients ask one question after the other until the change is over. A request is lost when its client gets an
error or too few tokens; the same questions are asked again when all is at rest, which gives the right tokens.
"""

import argparse
import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.load import Answer, Client, Question, num_lost, num_wrong, questions
from tests.faults.matrix import save, say, small_chat_model
from tests.faults.network_cut import num_recoveries
from tests.faults.rehearsal import MODEL_NAME, Rehearsal, Run, rehearsal
from tests.ray_cluster import ROOT, private_pdserve

OUTPUT = ROOT / "benchmarks" / "results" / "scale-storm-cpu.json"
NUM_CLIENTS = 8
PROMPT, OUTPUT_TOKENS = (30, 120), (60, 160)
BOTH = {"prefill": 2, "decode": 2}
"""The size of the pools when nothing is asked of them."""
_MOVED = '{cause="draining"}'


@dataclass(frozen=True, slots=True)
class Change:
    """What is asked of the pools, one after the other, each followed to its end."""

    row: str
    what: str
    steps: tuple[Mapping[str, Any], ...]
    replaced: tuple[str, ...]
    """Workers whose processes are others afterwards."""
    moves: bool = False
    """Requests are to be moved, because the deadline is too short for them."""


def scale_in(pool: str, deadline_s: float) -> Change:
    """By one worker, and out again."""
    steps = ({"scale": {pool: 1}, "deadline_s": deadline_s}, {"scale": BOTH, "deadline_s": deadline_s})
    what = f"{pool} pool scaled in from 2 to 1, {_time(deadline_s)}, and out again"
    return Change("scale-in", what, steps, (f"{pool}-1",), pool == "decode" and not deadline_s)


def drain(worker: str, deadline_s: float) -> Change:
    steps = ({"drain": worker, "deadline_s": deadline_s},)
    what = f"a {worker.partition('-')[0]} worker drained and replaced, {_time(deadline_s)}"
    return Change("scale-in", what, steps, (worker,), worker.startswith("decode") and not deadline_s)


def rollout(step_budget_ms: int) -> Change:
    """Of an engine setting."""
    step = {"roll_out": {"engine.step_budget_ms": step_budget_ms}, "deadline_s": 1.0}
    workers = tuple(f"{pool}-{index}" for pool in BOTH for index in range(2))
    return Change("rollout", "all workers replaced by ones with another configuration", (step,), workers)


def storm(num_scale_ins: int, num_drains: int, num_rollouts: int) -> Iterator[Change]:
    """Pools, workers and deadlines in turn."""
    deadlines = itertools.cycle((0.0, 30.0, 0.3))
    pools = itertools.cycle(("decode", "prefill"))
    for _ in range(num_scale_ins):
        yield scale_in(next(pools), next(deadlines))
    for number in range(num_drains):
        yield drain(f"{next(pools)}-{number // 2 % 2}", next(deadlines))
    for number in range(num_rollouts):
        yield rollout(100 + number % 2)


async def change(system: Rehearsal, wanted: Change, seed: int) -> Run:
    """Ask for it while requests are under way, and see what came of them."""
    before = await system.status()
    moved = await num_recoveries(system, _MOVED)
    started_at = time.monotonic()
    async with Client(system.url, MODEL_NAME) as client:
        over = asyncio.Event()
        seeds = range(NUM_CLIENTS * seed, NUM_CLIENTS * (seed + 1))
        asking = [asyncio.create_task(_keep_asking(client, each, over)) for each in seeds]
        await client.begun.wait()
        for step in wanted.steps:
            await system.ask(**step)
        over.set()
        pairs = [pair for task in asking for pair in await task]
        leaked, problems = await system.at_rest()
        whole_after_s = time.monotonic() - started_at
        asked, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
        expected = await _ask_in_turn(client, asked)
    happened = _are_others(before, await system.status(), wanted.replaced)
    if wanted.moves:
        happened &= await num_recoveries(system, _MOVED) > moved
    problems += [f"request {i}: {answer.error}" for i, answer in enumerate(answers) if answer.error]
    problems += [f"at rest: {answer.error}" for answer in expected if answer.error]
    return Run(
        wanted.row,
        wanted.what,
        happened,
        len(asked),
        num_lost(asked, answers),
        num_wrong(answers, expected),
        leaked,
        round(max(answer.longest_pause_s for answer in answers), 3),
        round(whole_after_s, 2),
        problems,
    )


@contextlib.contextmanager
def small_system() -> Iterator[Rehearsal]:
    """Two prefill and two decode workers, for as long as the block runs."""
    torch.set_num_threads(1)
    with small_chat_model() as model, private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
        yield system


def run_storm(changes: Iterable[Change]) -> Iterator[Run]:
    """On one system."""
    with small_system() as system, asyncio.Runner() as runner:
        for seed, wanted in enumerate(changes):
            yield runner.run(change(system, wanted, seed))


def main() -> int:
    """0 when nothing was lost, wrong or left in any run."""
    options = _options()
    runs: list[Run] = []
    for run in run_storm(storm(options.scale_ins, options.drains, options.rollouts)):
        runs.append(run)
        say(run)
        save(options.output, runs, module="tests.faults.pool_changes")
    return 0 if all(run.is_good for run in runs) else 1


async def _keep_asking(client: Client, seed: int, over: asyncio.Event) -> list[tuple[Question, Answer]]:
    """One question after the other until it is over."""
    pairs: list[tuple[Question, Answer]] = []
    while not over.is_set():
        (question,) = questions(1, 1000 * seed + len(pairs), PROMPT, OUTPUT_TOKENS)
        pairs.append((question, await client.ask(question)))
    return pairs


async def _ask_in_turn(client: Client, asked: Sequence[Question]) -> list[Answer]:
    """As many at a time as there were clients."""
    answers: list[Answer] = []
    for first in range(0, len(asked), NUM_CLIENTS):
        answers += await client.ask_all(asked[first : first + NUM_CLIENTS])
    return answers


def _are_others(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> bool:
    old, new = ({worker["id"]: worker["pid"] for worker in status["workers"]} for status in (before, after))
    return set(old) == set(new) and all(old[name] != new[name] for name in names)


def _time(deadline_s: float) -> str:
    return f"with {deadline_s:g} s for what runs" if deadline_s else "with no time for what runs"


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale-ins", type=int, default=100, help="each followed by a scale-out")
    parser.add_argument("--drains", type=int, default=20)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the results are written")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
