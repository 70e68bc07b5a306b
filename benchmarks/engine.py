"""Prefill and decode of the engine against plain transformers, alternately in one run.

    python -m benchmarks.engine --threads 2 --json results.json
    python -m benchmarks.engine --smoke

The model is a random 0.4B Llama shape in bfloat16 (387M parameters). Decode steps run at a context of 520
tokens per sequence; KV contents are random, since their values do not change the work. Each measured pair
runs once with the engine and once with transformers (its default attention and DynamicCache), in turns; the
ratio is of the medians.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.conditions import conditions
from pdserve.contract.ids import BlockId
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SampleRequest, SequenceStep, StepBatch
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings

CONTEXT = 520
BATCHES = (1, 8, 32)
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs."""

    median_s: float
    min_s: float
    max_s: float
    runs: int


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        print("making the model", flush=True)
        make_model(Path(folder))
        engine = ModelEngine.load(
            EngineSettings(folder, threads=arguments.threads, kv_memory_bytes=1 << 30), progress=print
        )
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    repeats = 3 if arguments.smoke else arguments.repeats
    result = describe(arguments) | measure(engine, plain, repeats)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


def make_model(folder: Path, shape: Mapping[str, Any] = SHAPE) -> None:
    """A random model of `shape` (keys of LlamaConfig), saved in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def measure(engine: ModelEngine, plain: Any, repeats: int) -> dict[str, Any]:
    """All pairs: seconds per engine and the ratios transformers / engine (more is better)."""
    seconds: dict[str, dict[str, Any]] = {}
    ratios: dict[str, float] = {}
    pairs: list[tuple[str, Callable[[], float], Callable[[], float]]] = [
        ("prefill_512", lambda: time_engine_prefill(engine, 512), lambda: time_plain_prefill(plain, 512))
    ]
    engine.blocks.tensor.normal_()
    for batch in BATCHES:
        pairs.append((f"decode_b{batch}", _engine_decode(engine, batch), _plain_decode(plain, batch)))
    for name, ours, theirs in pairs:
        mine, other = alternate(ours, theirs, repeats)
        seconds[name] = {"engine": asdict(mine), "transformers": asdict(other)}
        ratios[name] = round(other.median_s / mine.median_s, 3)
        print(f"{name}: {mine.median_s * 1e3:.1f} ms, transformers {other.median_s * 1e3:.1f} ms", flush=True)
    prefill_s = seconds["prefill_512"]["engine"]["median_s"]
    return {
        "ratios_to_transformers": ratios,
        "prefill_512_tokens_per_s": round(512 / prefill_s, 1),
        "decode_ms_per_step": {
            f"b{batch}": round(seconds[f"decode_b{batch}"]["engine"]["median_s"] * 1e3, 2)
            for batch in BATCHES
        },
        "seconds": seconds,
        "calibrated_step_cost": asdict(engine.cost),
    }


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[Timing, Timing]:
    """Run both in turns, once unmeasured and then `repeats` times."""
    ours(), theirs()
    runs = [(ours(), theirs()) for _ in range(repeats)]
    return _timing([mine for mine, _ in runs]), _timing([other for _, other in runs])


def time_engine_prefill(engine: ModelEngine, length: int) -> float:
    """Seconds of one step that prefills `length` tokens and samples the next."""
    table = [BlockId(block) for block in range(-(-length // engine.info.block_size))]
    tokens = pack_tokens(_tokens(length))
    return engine.step(StepBatch([SequenceStep(tokens, 0, table, sample=_greedy(length))])).seconds


def time_plain_prefill(plain: Any, length: int) -> float:
    ids = torch.tensor([_tokens(length)])
    started = time.perf_counter()
    with torch.inference_mode():
        plain(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
    return time.perf_counter() - started


def _engine_decode(engine: ModelEngine, batch: int) -> Callable[[], float]:
    """A decode step of `batch` sequences that hold CONTEXT tokens each, in blocks of their own."""
    per_sequence = CONTEXT // engine.info.block_size + 1
    sequences = [
        SequenceStep(
            pack_tokens([index + 1]),
            CONTEXT,
            [BlockId(index * per_sequence + block) for block in range(per_sequence)],
            sample=_greedy(CONTEXT + 1),
            as_decode=True,
        )
        for index in range(batch)
    ]
    return lambda: engine.step(StepBatch(sequences)).seconds


def _plain_decode(plain: Any, batch: int) -> Callable[[], float]:
    """The same with a DynamicCache; filling the cache is not timed."""
    shape = (
        batch,
        SHAPE["num_key_value_heads"],
        CONTEXT,
        SHAPE["hidden_size"] // SHAPE["num_attention_heads"],
    )
    states = torch.randn(shape, dtype=torch.bfloat16)
    ids = torch.arange(1, batch + 1).unsqueeze(1)

    def run() -> float:
        cache = DynamicCache(config=plain.config)
        for layer in range(SHAPE["num_hidden_layers"]):
            cache.update(states, states, layer)
        started = time.perf_counter()
        with torch.inference_mode():
            plain(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - started

    return run


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where, how and on which commit this was measured."""
    return conditions("engine") | {
        "threads": arguments.threads,
        "model": {"shape": SHAPE, "dtype": "bfloat16", "context": CONTEXT},
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine against plain transformers.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="3 repeats; under 3 minutes on 2 cores")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    return parser.parse_args()


def _timing(seconds: list[float]) -> Timing:
    return Timing(median(seconds), min(seconds), max(seconds), len(seconds))


def _tokens(length: int) -> list[int]:
    return [(7919 * (index + 1)) % SHAPE["vocab_size"] for index in range(length)]


def _greedy(position: int) -> SampleRequest:
    return SampleRequest(SamplingParams(temperature=0.0), seed=0, position=position, output_index=0)


if __name__ == "__main__":
    main()
