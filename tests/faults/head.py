"""Ray's head dies, and with it the way to start, end or find processes. Who runs goes on."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil

from tests.faults.rehearsal import Case, Rehearsal, Run

CASE = Case("head", "Ray's head is killed under load and stays away", seed=30_000)
UNDER_WAY_S = 0.15
"""After so long the first answers have begun and the last have not."""
GONE = "Ray's head is gone"
"""What the launcher says of it."""


async def lose_head(system: Rehearsal, away_s: float) -> Run:
    """One round of requests before, one during, and rounds after the head's death until it has been away for
    `away_s`; at least one. All of them as one run."""

    async def lose() -> None:
        await asyncio.sleep(UNDER_WAY_S)
        kill_head(psutil.Process(system.up.process.pid))

    rounds = [await system.run(CASE), await system.run(_next(1), lose)]
    away_since = time.monotonic()
    while len(rounds) == 2 or time.monotonic() < away_since + away_s:
        rounds.append(await system.run(_next(len(rounds))))
    run = _as_one(rounds)
    await asyncio.to_thread(system.up.wait_for, GONE)
    return run


def kill_head(launcher: psutil.Process) -> None:
    """The GCS of its local Ray."""
    (head,) = [process for process in launcher.children() if process.name() == "gcs_server"]
    head.kill()


def _next(number: int) -> Case:
    return replace(CASE, seed=CASE.seed + number)


def _as_one(rounds: Sequence[Run]) -> Run:
    return Run(
        CASE.row,
        CASE.what,
        all(run.happened for run in rounds),
        sum(run.num_requests for run in rounds),
        sum(run.num_lost for run in rounds),
        sum(run.num_wrong_tokens for run in rounds),
        sum(run.num_leaked_blocks for run in rounds),
        max(run.longest_pause_s for run in rounds),
        rounds[1].whole_after_s,
        [problem for run in rounds for problem in run.problems],
    )
