"""What the hand-off costs a user: time to first and second token, split against unsplit, and KV transfer.

    python -m benchmarks.handoff --json results.json
    python -m benchmarks.handoff --smoke

Two systems run on this machine, one with a prefill and a decode worker and one with a single unsplit worker,
each worker with one thread; a third copy of the same engine, in this process, computes the same prompt
without any server. One client sends one request at a time over HTTP: bare engine, split, unsplit, in turns,
each with a prompt of its own. The bare engine computes prompts in the chunks that keep the workers' step
budget, and in one step, which shows what the budget costs.

What the stack adds to the time to first token is given twice: against the bare engine in the same round,
which drifts with the machine, and, split, against the seconds that the prefill worker's own engine steps took
for that very request, read from its metrics. KV transfer rates per transport come from
`benchmarks.transports`, run afterwards.
"""

import argparse
import json
import os
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks import transports
from benchmarks.conditions import conditions
from benchmarks.engine import SHAPE, make_model
from benchmarks.systems import System, running, step_seconds
from pdserve.contract.ids import BlockId
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, slice_tokens
from pdserve.contract.work import SampleRequest, SequenceStep, StepBatch
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within, next_chunk_stop
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings

KV_MEMORY = "512MiB"
STEP_BUDGET_S = 0.2
"""The default of the workers."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one request over HTTP, seconds from sending it."""

    first_token_s: float
    second_token_s: float
    prefill_steps_s: float | None = None
    """What the prefill worker's engine steps for this request took."""


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    rounds = 3 if arguments.smoke else arguments.rounds
    with tempfile.TemporaryDirectory() as folder, ExitStack() as systems:
        make_model(Path(folder))
        engine = ModelEngine.load(
            EngineSettings(folder, threads=1, kv_memory_bytes=512 << 20, chunk_tokens=arguments.chunk_tokens)
        )
        running_systems = {
            name: systems.enter_context(running(config(name, folder, pools, arguments.chunk_tokens)))
            for name, pools in (("split", (1, 1)), ("unsplit", (0, 1)))
        }
        chunk_tokens = chunk_tokens_within(STEP_BUDGET_S, engine.cost, engine.info.chunk_tokens)
        latencies = measure(engine, chunk_tokens, running_systems, arguments.tokens, rounds)
    rates = transports.run((64 << 20) // transports.LAYOUT.block_bytes, 3 if arguments.smoke else 9)
    result = conditions("handoff") | {
        "model": {"shape": SHAPE, "dtype": "bfloat16"},
        "prompt_tokens": arguments.tokens,
        "chunk_tokens": chunk_tokens,
        "step_budget_s": STEP_BUDGET_S,
        "rounds": rounds,
        "latency": latencies,
        "transfer": {name: rate.summary(rates["copy"]) for name, rate in rates.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


def config(name: str, model: str, pools: tuple[int, int], chunk_tokens: int) -> dict[str, Any]:
    """The deployment of a system with `pools` prefill and decode workers."""
    num_prefill, num_decode = pools
    return {
        "name": f"bench-{name}",
        "model": {"path": model, "served_name": "bench"},
        "engine": {"threads": 1, "kv_memory": KV_MEMORY, "chunk_tokens": chunk_tokens},
        "pools": {"prefill": {"replicas": num_prefill}, "decode": {"replicas": num_decode}},
        "router": {"http_port": 0},
    }


def measure(
    engine: ModelEngine, chunk_tokens: int, systems: dict[str, System], num_tokens: int, rounds: int
) -> dict[str, Any]:
    """Alternate all; the first two rounds warm up and are not counted."""
    rng = random.Random(1)
    bare: list[float] = []
    in_one_step: list[float] = []
    served: dict[str, list[Latency]] = {name: [] for name in systems}
    with httpx.Client(timeout=120) as client:
        for number in range(rounds + 2):
            in_one_step.append(bare_prefill(engine, _prompt(rng, num_tokens), num_tokens))
            bare.append(bare_prefill(engine, _prompt(rng, num_tokens), chunk_tokens))
            for name, system in systems.items():
                served[name].append(request(client, system, _prompt(rng, num_tokens)))
            print(f"round {number}: bare {bare[-1]:.3f} s, " + _line(served), flush=True)
    engine_alone = {
        "bare_prefill_s": _spread(bare[2:]),
        "bare_prefill_in_one_step_s": _spread(in_one_step[2:]),
    }
    return engine_alone | {name: _summary(bare[2:], latencies[2:]) for name, latencies in served.items()}


def bare_prefill(engine: ModelEngine, prompt: list[int], chunk_tokens: int) -> float:
    """Seconds of the steps that prefill the prompt in chunks and sample the next token; no server."""
    tokens, info = pack_tokens(prompt), engine.info
    table = [BlockId(block) for block in range(-(-len(prompt) // info.block_size))]
    greedy = SampleRequest(SamplingParams(temperature=0.0), seed=0, position=len(prompt), output_index=0)
    started = time.perf_counter()
    start = 0
    while start < len(prompt):
        stop = next_chunk_stop(PromptProgress(start, len(prompt)), chunk_tokens)
        sample = greedy if stop == len(prompt) else None
        engine.step(StepBatch([SequenceStep(slice_tokens(tokens, start, stop), start, table, sample)]))
        start = stop
    return time.perf_counter() - started


def request(client: httpx.Client, system: System, prompt: list[int]) -> Latency:
    """Stream two tokens."""
    steps_before_s = _step_seconds(client, system)
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    arrivals: list[float] = []
    started = time.perf_counter()
    with client.stream("POST", f"{system.url}/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["token_ids"]:
                arrivals.append(time.perf_counter() - started)
    steps_s = _step_seconds(client, system)
    return Latency(arrivals[0], arrivals[1], None if steps_s is None else steps_s - (steps_before_s or 0.0))


def _step_seconds(client: httpx.Client, system: System) -> float | None:
    """All engine steps of the prefill worker so far; None: unsplit."""
    prefill = next((worker for worker in system.workers if worker.pool == "prefill"), None)
    return None if prefill is None else step_seconds(client, prefill)


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, SHAPE["vocab_size"]) for _ in range(length)]


def _summary(bare: list[float], latencies: list[Latency]) -> dict[str, Any]:
    first = [latency.first_token_s for latency in latencies]
    added_ms = [(one - other) * 1e3 for one, other in zip(first, bare, strict=True)]
    steps_s = [latency.prefill_steps_s for latency in latencies]
    over_steps_ms = [
        (one - steps) * 1e3 for one, steps in zip(first, steps_s, strict=True) if steps is not None
    ]
    gaps_ms = [(latency.second_token_s - latency.first_token_s) * 1e3 for latency in latencies]
    return {
        "first_token_s": _spread(first),
        "added_to_bare_prefill_ms": _spread(added_ms),
        "added_at_the_median_ms": round((median(first) - median(bare)) * 1e3, 2),
        "added_to_own_prefill_steps_ms": _spread(over_steps_ms) if over_steps_ms else None,
        "first_to_second_token_ms": _spread(gaps_ms),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def _line(served: dict[str, list[Latency]]) -> str:
    return ", ".join(f"{name} {latencies[-1].first_token_s:.3f} s" for name, latencies in served.items())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to first and second token, split against unsplit.")
    parser.add_argument("--tokens", type=int, default=512, help="prompt length")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="3 rounds; under 3 minutes on 2 cores")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
