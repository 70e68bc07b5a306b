"""`pdserve bench`: the load generator on the command line."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pdserve
from controller.terminal import progress_line, say
from load_generator.arrivals import Lengths, drawn
from load_generator.driver import Progress, Run
from load_generator.page import write_page
from load_generator.prompts import PromptForm, Prompts, Vocabulary
from load_generator.records import Record
from load_generator.report import Result, as_json, sweep_table, table
from load_generator.summary import Slo, summarise
from load_generator.sweep import Tried, find_knee, next_rate
from load_generator.target import ListedModel, TargetSettings, list_models, open_target
from load_generator.traces import PlannedRequest, read_trace, scaled
from pdserve.clock import LoopClock
from pdserve.contract.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the command line asks for."""

    url: str
    model: str | None = None
    api_key: str | None = None
    trace: Path | None = None
    speed: float = 1.0
    """Of a trace's replay."""
    rate: float | None = None
    """Requests per second that are drawn, where there is no trace."""
    burstiness: float = 1.0
    concurrency: int | None = None
    """Closed loop with so many requests in flight, instead of arrivals."""
    sweep: bool = False
    min_good_share: float = 0.9
    max_runs: int = 12
    count: int | None = None
    lengths: Lengths = field(default_factory=Lengths)
    form: PromptForm = PromptForm.TOKENS
    vocabulary: Vocabulary | None = None
    """None: from the server's own word of its vocabulary, if it has one."""
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra_body: tuple[tuple[str, Any], ...] = ()
    slo: Slo = field(default_factory=Slo)
    skip_s: float = 0.0
    seed: int = 0
    json_file: Path | None = None
    page_file: Path | None = None


DEFAULT_COUNT = 200


async def run_bench(options: BenchOptions) -> int:
    """Run, print, write. The exit code is 0 when every request succeeded. Raises PdserveError subclasses."""
    trace = read_trace(options.trace, options.count) if options.trace else None
    bench = _Bench(options, await _model(options), trace)
    results = await bench.sweep() if options.sweep else [await bench.run_once()]
    if options.sweep:
        say(f"\n{sweep_table(results)}\n\n{_knee_words(results, options)}")
    _write(options, results)
    return 0 if options.sweep or not results[0].summary.errors else 1


class _Bench:
    def __init__(self, options: BenchOptions, model: ListedModel, trace: list[PlannedRequest] | None) -> None:
        self._options = options
        self._trace = trace
        known = Vocabulary.within(model.vocab_size) if model.vocab_size else Vocabulary()
        self._vocabulary = options.vocabulary or known
        self._target = TargetSettings(
            url=options.url,
            model=model.name,
            api_key=options.api_key,
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
            timeout_s=options.timeout_s,
            extra_body=options.extra_body,
        )

    async def run_once(self) -> Result:
        result = await self._run(self._planned(self._options.rate, self._options.speed), self._options.seed)
        say(table(result))
        return result

    async def sweep(self) -> list[Result]:
        """Runs at growing rates until the knee is found. Every run has prompts of its own, so that none finds
        the prefixes of the run before it in a cache."""
        options = self._options
        results: list[Result] = []
        tried: list[Tried] = []
        first = options.rate or (_mean_rate(self._trace) * options.speed if self._trace else 1.0)
        while (rate := next_rate(tried, first, options.min_good_share, options.max_runs)) is not None:
            result = await self._run(self._planned_at(rate), options.seed + len(results))
            results.append(result)
            tried.append(Tried(rate, result.summary.good_share))
            say(table(result) + "\n")
        return results

    def _planned_at(self, rate: float) -> list[PlannedRequest]:
        if self._trace is None:
            return self._planned(rate, 1.0)
        return self._planned(None, rate / _mean_rate(self._trace))

    def _planned(self, rate: float | None, speed: float) -> list[PlannedRequest]:
        options = self._options
        if self._trace is not None:
            return scaled(self._trace, speed)
        random = np.random.default_rng(options.seed)
        count = options.count or DEFAULT_COUNT
        return drawn(count, rate or float("inf"), options.burstiness, options.lengths, random)

    async def _run(self, planned: Sequence[PlannedRequest], seed: int) -> Result:
        options = self._options
        prompts = Prompts(options.form, self._vocabulary, seed)
        async with open_target(self._target, prompts) as target:
            run = Run(target, planned, LoopClock(), _show)
            records = await (run.closed_loop(options.concurrency) if options.concurrency else run.open_loop())
        progress_line("")
        name = _name(options, planned)
        try:
            summary = summarise(records, options.slo, options.skip_s)
        except ValueError as error:
            raise ConfigError(f"--skip {options.skip_s:g}: {error}; ask for more requests") from error
        return Result(name, self._settings(seed), options.slo, summary, _counted(records, options.skip_s))

    def _settings(self, seed: int) -> dict[str, Any]:
        options = self._options
        return {
            "url": options.url,
            "model": self._target.model,
            "trace": options.trace.name if options.trace else None,
            "concurrency": options.concurrency,
            "burstiness": options.burstiness,
            "form": options.form.value,
            "temperature": options.temperature,
            "ignore_eos": options.ignore_eos,
            "seed": seed,
            "skip_s": options.skip_s,
        }


async def _model(options: BenchOptions) -> ListedModel:
    """As the server lists it. A name that was given is believed also where the server has no list."""
    try:
        models = await list_models(options.url, options.api_key)
    except InvalidRequest:
        if options.model is None:
            raise
        models = []
    found = [model for model in models if options.model in (None, model.name)]
    return found[0] if found else ListedModel(str(options.model))


def _name(options: BenchOptions, planned: Sequence[PlannedRequest]) -> str:
    what = options.trace.name if options.trace else "drawn requests"
    if options.concurrency:
        return f"{what}, {options.concurrency} in flight"
    return f"{what} at {_mean_rate(planned):.3g} requests/s"


def _mean_rate(planned: Sequence[PlannedRequest]) -> float:
    span_s = planned[-1].due_s - planned[0].due_s
    return (len(planned) - 1) / span_s if span_s else float("inf")


def _counted(records: Sequence[Record], skip_s: float) -> list[Record]:
    return [record for record in records if record.planned.due_s >= skip_s]


def _knee_words(results: Sequence[Result], options: BenchOptions) -> str:
    tried = [Tried(result.summary.offered_rate, result.summary.good_share) for result in results]
    knee = find_knee(tried, options.min_good_share)
    share = f"{options.min_good_share:.0%} of the requests good"
    if knee.good_rate is None:
        return f"no rate down to {knee.bad_rate:.3g} requests/s has {share}"
    if knee.bad_rate is None:
        return f"{share} up to {knee.good_rate:.3g} requests/s, the highest rate tried: the knee is above it"
    return f"the knee: {share} at {knee.good_rate:.3g} requests/s, not at {knee.bad_rate:.3g}"


def _show(progress: Progress) -> None:
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    progress_line(
        f"{progress.seconds:5.0f} s: {progress.num_ended} of {progress.num_planned} done, "
        f"{progress.num_running} running{failed}"
    )


def _write(options: BenchOptions, results: Sequence[Result]) -> None:
    if options.json_file is not None:
        content = json.dumps(as_json(results, _conditions()), separators=(",", ":"))
        try:
            options.json_file.write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write {options.json_file} ({error.strerror}): choose another --json"
            ) from error
        say(f"written: {options.json_file}")
    if options.page_file is not None:
        write_page(options.page_file, f"{options.url}: {results[0].settings['model']}", results)
        say(f"written: {options.page_file}")


def _conditions() -> dict[str, Any]:
    return {
        "command": shlex.join(["pdserve", *sys.argv[1:]]),
        "pdserve": pdserve.__version__,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "generator": {"machine": platform.machine(), "cores": os.cpu_count()},
    }
