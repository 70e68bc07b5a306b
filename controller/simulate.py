"""`pdserve simulate`: a trace served in virtual time, on the command line."""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controller.terminal import say
from load_generator.report import table
from load_generator.summary import Slo
from load_generator.traces import PlannedRequest, read_trace, scaled
from pdserve.contract.errors import ConfigError
from pdserve.contract.work import StepCost
from simulator.outcome import Outcome, outcome_of
from simulator.page import write_timelines
from simulator.system import Finished, SimulatedSystem, simulate
from simulator.timing import Timing, device


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What the command line asks for."""

    trace: Path
    system: SimulatedSystem
    limit: int | None = None
    speed: float = 1.0
    slo: Slo = field(default_factory=Slo)
    json: bool = False
    page_file: Path | None = None


def run_simulate(options: argparse.Namespace) -> int:
    """Simulate, print, write; the exit code. Raises PdserveError subclasses."""
    wanted = _parsed(options)
    planned = scaled(read_trace(wanted.trace, wanted.limit), wanted.speed)
    finished = simulate(planned, wanted.system)
    outcome = outcome_of(finished, wanted.slo, _name(wanted, planned), _settings(wanted, finished))
    if wanted.page_file is not None:
        write_timelines(wanted.page_file, outcome.result.name, outcome, finished.timeline)
    say(json.dumps(outcome.as_json()) if wanted.json else _words(outcome, wanted.system.timing))
    return 0


def _parsed(options: argparse.Namespace) -> SimulateOptions:
    timing = device(options.device)
    if options.calibration is not None:
        timing = _calibrated(timing, options.calibration)
    if options.pool_tokens is not None:
        timing = replace(timing, pool_tokens=options.pool_tokens)
    system = SimulatedSystem(
        timing=timing,
        policy=options.policy,
        num_prefill=options.prefill,
        num_decode=options.decode,
        num_unsplit=options.unsplit,
        block_tokens=options.block_size,
        seed=options.seed,
    )
    slo = Slo(options.ttft, options.tpot, options.itl, options.e2e)
    return SimulateOptions(
        options.trace, system, options.limit, options.speed, slo, options.json, options.page
    )


def _calibrated(timing: Timing, path: Path) -> Timing:
    """With the step times of a result file of benchmarks.engine."""
    try:
        cost = StepCost(**json.loads(path.read_text(encoding="utf-8"))["calibrated_step_cost"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibration {path} is no result of python -m benchmarks.engine --json: {error}"
        ) from error
    return replace(timing, cost=cost, per_attention_pair_s=0.0, source=f"the calibration in {path.name}")


def _name(wanted: SimulateOptions, planned: list[PlannedRequest]) -> str:
    system = wanted.system
    workers = f"{system.num_prefill}+{system.num_decode}"
    if system.num_unsplit:
        workers = f"{system.num_unsplit} unsplit"
    span_s = planned[-1].due_s
    rate = f"{(len(planned) - 1) / span_s:.3g} requests/s" if span_s else "all at once"
    return f"{wanted.trace.name}, {rate}, {workers} {system.timing.name}, {system.policy}"


def _settings(wanted: SimulateOptions, finished: Finished) -> dict[str, Any]:
    system = wanted.system
    return {
        "trace": wanted.trace.name,
        "limit": wanted.limit,
        "speed": wanted.speed,
        "policy": system.policy,
        "prefill": 0 if system.num_unsplit else system.num_prefill,
        "decode": 0 if system.num_unsplit else system.num_decode,
        "unsplit": system.num_unsplit,
        "device": system.timing.name,
        "times_from": system.timing.source,
        "block_size": finished.block_tokens,
        "pool_tokens": system.timing.pool_tokens,
        "seed": system.seed,
    }


def _words(outcome: Outcome, timing: Timing) -> str:
    busy = outcome.prefill_busy_share
    lines = [
        table(outcome.result),
        "",
        f"  prefix hits {outcome.prefix_hit_rate:.1%} of the prompt tokens, "
        f"{outcome.num_preemptions} preemptions"
        + ("" if busy is None else f", prefill workers busy {busy:.0%} of the time"),
        f"  step times of {timing.name}: {timing.source}",
        f"  {outcome.virtual_s:.0f} s simulated in {outcome.wall_s:.1f} s, "
        f"{outcome.speed:.0f} times as fast as real time",
    ]
    return "\n".join(lines)
