"""One run for `benchmarks.splitting`: a workload at a rate against a running system, and who used the cores.

The process that imports this is the load generator; nothing of the measured system runs in it.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.systems import System, step_seconds
from load_generator.driver import Run
from load_generator.prompts import PromptForm, Prompts, Vocabulary
from load_generator.records import Record
from load_generator.summary import Distribution, Slo, summarise
from load_generator.target import TargetSettings, open_target
from load_generator.traces import PlannedRequest, read_trace, scaled
from pdserve.clock import LoopClock

MODEL_NAME = "bench"
SLOS = {
    "pace": Slo(ttft_ms=750.0, tpot_ms=40.0),
    "no stall": Slo(ttft_ms=750.0, itl_ms=100.0),
}
"""What counts as good: a first token soon, and then either a mean pace or no long wait at all."""
REQUEST_TIMEOUT_S = 60.0
NOT_OF_THE_SYSTEM = ("generator", "others")
"""What else uses the cores: this process, and all other processes of the machine."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Some requests of a trace, at the trace's own pace."""

    name: str
    requests: tuple[PlannedRequest, ...]

    def at_rate(self, rate: float) -> list[PlannedRequest]:
        """The same requests at a mean of `rate` per second."""
        return scaled(self.requests, rate * self.requests[-1].due_s / (len(self.requests) - 1))

    def facts(self) -> dict[str, float]:
        """Numbers and mean lengths; `shared_share`: of the prompt blocks, those in a prefix seen before."""
        seen: set[int] = set()
        num_blocks = num_shared = 0
        for request in self.requests:
            num_blocks += len(request.prefix_ids)
            num_shared += sum(
                block in seen for block in request.prefix_ids
            )  # equal ids: equal whole prefixes
            seen.update(request.prefix_ids)
        count = len(self.requests)
        return {
            "num_requests": count,
            "mean_prompt_tokens": round(sum(r.num_prompt_tokens for r in self.requests) / count, 1),
            "mean_output_tokens": round(sum(r.num_output_tokens for r in self.requests) / count, 1),
            "shared_share": round(num_shared / max(1, num_blocks), 4),
        }


def read_workload(trace: Path, count: int) -> Workload:
    """About `count` requests: the first ones, whose prefixes belong together, or where the trace knows no
    prefixes one of every few, which keeps its bursts."""
    requests = read_trace(trace)
    if not requests[0].prefix_ids:
        requests = requests[:: max(1, len(requests) // count)]
    return Workload(trace.stem, tuple(requests[:count]))


async def replay(
    system: System, planned: Sequence[PlannedRequest], vocabulary: Vocabulary, seed: int
) -> dict[str, Any]:
    """Send all, wait for all, and say what came of it (JSON). `seed` makes the prompts: runs with the same
    one find each other's prefixes in the caches."""
    usage = _Usage(system)
    settings = TargetSettings(system.url, MODEL_NAME, timeout_s=REQUEST_TIMEOUT_S)
    async with open_target(settings, Prompts(PromptForm.TOKENS, vocabulary, seed)) as target:
        records = await Run(target, planned, LoopClock()).open_loop()
    return _told(records) | usage.told()


def _told(records: Sequence[Record]) -> dict[str, Any]:
    by_slo = {name: summarise(records, slo) for name, slo in SLOS.items()}
    summary = next(iter(by_slo.values()))
    return {
        "num_requests": summary.num_requests,
        "errors": summary.errors,
        "duration_s": round(summary.duration_s, 3),
        "offered_rate": round(summary.offered_rate, 3),
        "served_rate": round(summary.request_rate, 3),
        "good_share": {name: round(each.good_share, 4) for name, each in by_slo.items()},
        "cached_share": round(summary.cached_share, 4),
        "first_token_ms": _percentiles(summary.time_to_first_token),
        "second_token_ms": _percentiles(summary.time_to_second_token),
        "inter_token_ms": _percentiles(summary.inter_token),
        "per_output_token_ms": _percentiles(summary.time_per_output_token),
        "sent_late_ms": _percentiles(summary.send_delay),
    }


def _percentiles(distribution: Distribution | None) -> dict[str, float] | None:
    if distribution is None:
        return None
    told = {f"p{percent}": round(value, 2) for percent, value in distribution.percentiles_ms.items()}
    return told | {"max": round(distribution.max_ms, 2)}


class _Usage:
    """What a system's processes use from when this is made until it is told."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._before = self._now()

    def told(self) -> dict[str, Any]:
        """`stepping`: share of the time in which each worker computes a step. `cores`: how many cores each
        process used on average, and those `NOT_OF_THE_SYSTEM`."""
        after = self._now()
        at_s, steps_s, cpu_s, machine_s = (
            {name: after[place][name] - spent for name, spent in self._before[place].items()}
            for place in range(4)
        )
        seconds = at_s["wall"]
        cores = {name: spent / seconds for name, spent in cpu_s.items()}
        cores["others"] = machine_s["busy"] / seconds - sum(cores.values())
        return {
            "wall_s": round(seconds, 3),
            "stepping": {name: round(spent / seconds, 3) for name, spent in steps_s.items()},
            "cores": {name: round(used, 3) for name, used in cores.items()},
        }

    def _now(self) -> tuple[dict[str, float], ...]:
        with httpx.Client(timeout=30.0) as client:
            steps_s = {worker.name: step_seconds(client, worker) for worker in self._system.workers}
        pids = {each.name: each.pid for each in (*self._system.routers, *self._system.workers)}
        pids["generator"] = os.getpid()
        cpu_s = {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
        return {"wall": time.monotonic()}, steps_s, cpu_s, {"busy": busy_s}
