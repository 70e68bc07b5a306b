"""`pdserve bench` and guidellm on the same server: whether they tell the same percentiles.

    python -m benchmarks.peer_generator --guidellm /somewhere/venv/bin/guidellm --json results.json

guidellm is another project's load generator; it comes into a virtual environment of its own (`pip install
guidellm`), since it brings what pdserve has no use for. The server is `pdserve up` with the model that comes
with pdserve, or whatever serves at `--url`. Both keep a closed loop of 1 and of 4 requests in flight, with
prompts of `PROMPT_TOKENS` tokens and answers of exactly `OUTPUT_TOKENS`, in turns, in an order that changes
from round to round; of each figure the median over the rounds and its range are told. What guidellm calls
inter-token latency is what pdserve calls time per output token: of one request, the time from its first to
its last token divided by the tokens after the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.conditions import conditions
from benchmarks.systems import running
from pdserve.demo import demo_model_path

CONCURRENCY = (1, 4)
PERCENTILES = (50, 90)
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
GUIDELLM_FIGURES = {
    "time_to_first_token_ms": ("time_to_first_token_ms", 1.0),
    "time_per_output_token_ms": ("inter_token_latency_ms", 1.0),
    "end_to_end_ms": ("request_latency", 1000.0),
}
"""Name here -> name there, and what makes milliseconds of it."""

Figures = dict[str, dict[str, float]]
"""Name -> percentile -> milliseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guidellm", required=True, type=Path, help="the command in its own environment")
    parser.add_argument("--url", help="of a server that runs (default: one is started)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=40, help="requests of one run")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    with _server(options.url) as url:
        result = conditions("peer_generator") | measure(url, options.guidellm, options.rounds, options.count)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def measure(url: str, guidellm: Path, rounds: int, count: int) -> dict[str, Any]:
    """The medians and ranges of both generators, by the number of requests in flight."""
    runs: dict[tuple[int, str], list[Figures]] = {}
    for number in range(rounds):
        for streams in CONCURRENCY:
            seed = len(CONCURRENCY) * number + streams  # no run finds the prompts of another in a cache
            generators = {
                "pdserve": lambda streams=streams, seed=seed: run_pdserve(url, streams, count, seed),
                "guidellm": lambda streams=streams, seed=seed: run_guidellm(
                    guidellm, url, streams, count, seed
                ),
            }
            for name in sorted(generators, reverse=bool(number % 2)):
                runs.setdefault((streams, name), []).append(generators[name]())
    version = subprocess.run([guidellm, "--version"], capture_output=True, text=True, check=True).stdout
    told = {
        f"{streams} in flight": {name: _summary(runs[streams, name]) for name in ("pdserve", "guidellm")}
        for streams in CONCURRENCY
    }
    return {
        "peer": version.strip().replace(" version:", ""),
        "rounds": rounds,
        "requests_per_run": count,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "milliseconds": told,
    }


def run_pdserve(url: str, streams: int, count: int, seed: int) -> Figures:
    """One run of `pdserve bench`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        sizes = ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
        load = ["--concurrency", str(streams), "--count", str(count), "--seed", str(seed)]
        command = [sys.executable, "-m", "controller.cli", "bench", "--url", url, *sizes, *load]
        subprocess.run([*command, "--json", file], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(file.read_text())["runs"][0]["summary"]
    names = ("time_to_first_token", "time_per_output_token", "end_to_end")
    return {
        f"{name}_ms": {f"p{each}": summary[name]["percentiles_ms"][str(each)] for each in PERCENTILES}
        for name in names
    }


def run_guidellm(guidellm: Path, url: str, streams: int, count: int, seed: int) -> Figures:
    """One run of guidellm, as its own report tells it."""
    scenario = {
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": url,
                "request_format": "/v1/completions",
            },
            "profile": {"kind": "concurrent", "streams": streams},
            "tokenizer": {"kind": "hf_auto", "model": str(demo_model_path())},
            "data": [
                {"kind": "synthetic_text", "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
            ],
            "constraints": [{"kind": "max_requests", "count": count}],
            "seed": {"kind": "static", "value": seed},
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "scenario.yaml", Path(folder) / "report.json"
        file.write_text(yaml.safe_dump(scenario))
        command = [guidellm, "run", "--config", file, "--output", f"kind=json,path={report}"]
        subprocess.run([*command, "--disable-console"], check=True, cwd=folder)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    return {
        name: {
            f"p{each}": metrics[theirs]["successful"]["percentiles"][f"p{each}"] * factor
            for each in PERCENTILES
        }
        for name, (theirs, factor) in GUIDELLM_FIGURES.items()
    }


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    config = {"name": "peer", "router": {"http_port": 0}, "engine": {"threads": 1, "kv_memory": "256MiB"}}
    with running(config) as system:
        yield system.url


def _summary(runs: list[Figures]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {percent: _spread([run[name][percent] for run in runs]) for percent in percentiles}
        for name, percentiles in runs[0].items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


if __name__ == "__main__":
    main()
