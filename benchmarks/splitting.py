"""What splitting buys: the same two cores as one prefill and one decode worker, and in two other ways.

    python -m benchmarks.splitting TRACES --json results.json
    python -m benchmarks.splitting TRACES --plan
    python -m benchmarks.splitting TRACES --smoke

TRACES is a folder of request traces (`*.jsonl`, any schema of `pdserve bench`). `benchmarks.splitting_plan`
has the arrangements. All of them run side by side on this machine, and those that are not measured idle. This
process is the load generator.

First the rate is swept, once for each workload and arrangement, to the knee: the highest rate at which 90 %
of the requests keep the SLO "pace". Then each workload is replayed at two rates that all arrangements have in
common, in turns: at 80 % of the lowest knee, where all of them keep up, and at the highest knee, where only
one does. All arrangements get the same prompts; no two repetitions share any.

Every finished run is in the results file at once, and the same command goes on where an earlier one ended.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.conditions import conditions
from benchmarks.engine import make_model
from benchmarks.replay import Workload, read_workload, replay
from benchmarks.splitting_plan import ARRANGEMENTS, USUAL, Plan, first_rate, run_seconds
from benchmarks.splitting_results import Results, sweep_of
from benchmarks.systems import System, running
from load_generator.prompts import Vocabulary
from load_generator.traces import PlannedRequest

WARM_UP_REQUESTS = 20


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the systems are ended then, too
    arguments = _parse()
    names = tuple(arguments.arrangements)
    plan = Plan(arrangements=names)
    if arguments.smoke:
        plan = Plan(num_requests=8, repetitions=1, max_sweep_runs=2, arrangements=names)
    traces = sorted(arguments.traces.glob("*.jsonl"))
    if not traces:
        raise SystemExit(f"no *.jsonl in {arguments.traces}")
    workloads = [read_workload(trace, plan.num_requests) for trace in traces]
    print(plan.words(workloads), flush=True)
    if not arguments.plan:
        measure(plan, workloads, Results(arguments.json, plan, workloads))


def measure(plan: Plan, workloads: Sequence[Workload], results: Results) -> None:
    """All that `results` lacks."""
    if results.is_complete:
        print("all of it is measured already")
        return
    results.content["conditions"].append(conditions("splitting"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        make_model(Path(folder), plan.shape)
        _make_tokenizer(plan.shape["vocab_size"]).save(f"{folder}/tokenizer.json")
        systems = {}
        for name in plan.arrangements:
            print(f"starting {name}: {ARRANGEMENTS[name].text}", flush=True)
            config = ARRANGEMENTS[name].config(name.replace(" ", "-"), Path(folder))
            systems[name] = ending.enter_context(running(config))
        measurement = _Measurement(systems, results, Vocabulary.within(plan.shape["vocab_size"]))
        asyncio.run(measurement.run(workloads))


class _Measurement:
    def __init__(self, systems: Mapping[str, System], results: Results, vocabulary: Vocabulary) -> None:
        self._systems = systems
        self._results = results
        self._vocabulary = vocabulary

    async def run(self, workloads: Sequence[Workload]) -> None:
        for name in self._systems:
            planned = workloads[0].at_rate(first_rate(workloads[0]))[:WARM_UP_REQUESTS]
            await self._replay(name, planned, "warm up")
        for workload in workloads:
            for name in self._systems:
                await self._sweep(workload, name)
        missing = list(self._results.missing())
        seconds = sum(run_seconds(run.workload, run.requests_per_s) for run in missing)
        print(f"measuring: {len(missing)} runs, about {seconds / 60:.0f} minutes", flush=True)
        for run in missing:
            prompts = f"{run.workload.name} {run.rate} {run.repetition}"
            told = await self._replay(run.arrangement, run.workload.at_rate(run.requests_per_s), prompts)
            self._keep(self._results.runs, run.key, told)

    async def _sweep(self, workload: Workload, name: str) -> None:
        while (rate := self._results.next_sweep_rate(workload, name)) is not None:
            num_tried = len(sweep_of(self._results.sweeps, workload.name, name))
            told = await self._replay(name, workload.at_rate(rate), f"{workload.name} sweep {num_tried}")
            key = {"workload": workload.name, "arrangement": name, "rate": rate}
            self._keep(self._results.sweeps, key, told)

    async def _replay(self, name: str, planned: Sequence[PlannedRequest], prompts: str) -> dict[str, Any]:
        """`prompts` names them: equal names, equal prompts."""
        return await replay(self._systems[name], planned, self._vocabulary, zlib.crc32(prompts.encode()))

    def _keep(self, runs: list[dict[str, Any]], key: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        runs.append({**key, **told})
        self._results.write()
        print(_line(key, told), flush=True)


def _make_tokenizer(vocab_size: int) -> Tokenizer:
    """A word for each token, so that every output token is an event of its own."""
    return Tokenizer(WordLevel({f"word{token}": token for token in range(vocab_size)}, unk_token="word0"))


def _line(key: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    what = " ".join(f"{value:.3g}/s" if isinstance(value, float) else str(value) for value in key.values())
    shares = ", ".join(f"{share:.0%} {name}" for name, share in told["good_share"].items())
    times = ", ".join(
        f"{name} {told[f'{name}_ms']['p50']:.0f} {told[f'{name}_ms']['p99']:.0f}"
        for name in ("first_token", "second_token", "inter_token")
    )
    return (
        f"{time.strftime('%H:%M:%S')} {what}: {told['duration_s']:.1f} s, good {shares}; p50 and p99 in ms: "
        f"{times}; cached {told['cached_share']:.0%}; stepping {told['stepping']}, cores {told['cores']}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="a folder of request traces")
    parser.add_argument("--arrangements", nargs="+", choices=ARRANGEMENTS, default=USUAL, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="8 requests a run, one repetition; 3 minutes")
    parser.add_argument("--plan", action="store_true", help="only say what would be measured")
    parser.add_argument("--json", metavar="FILE", type=Path, help="results, also those of an earlier command")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    main()
