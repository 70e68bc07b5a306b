"""Benchmarks do what they say, on a model so small that its figures mean nothing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import engine as benchmark
from benchmarks import live_page, overlap
from benchmarks.conditions import conditions
from benchmarks.replay import read_workload
from benchmarks.splitting import measure
from benchmarks.splitting_plan import Plan
from benchmarks.splitting_results import Results
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings
from tests.browser import needs_browser
from tests.ray_cluster import private_pdserve

TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_it_measures_pairs_of_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TINY.items():
        monkeypatch.setitem(benchmark.SHAPE, key, value)
    benchmark.make_model(tmp_path)
    engine = ModelEngine.load(EngineSettings(str(tmp_path), threads=1, kv_memory_bytes=16 << 20))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    result = benchmark.measure(engine, plain, repeats=1)
    names = {"decode_b1", "decode_b8", "decode_b32", "prefill_512"}
    assert set(result["ratios_to_transformers"]) == names
    assert all(ratio > 0 for ratio in result["ratios_to_transformers"].values())
    assert set(result["decode_ms_per_step"]) == {"b1", "b8", "b32"}
    assert result["prefill_512_tokens_per_s"] > 0
    for timings in result["seconds"].values():
        assert {timing["runs"] for timing in timings.values()} == {1}


def test_the_overlap_is_measured_with_and_without_transfers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in TINY.items():
        monkeypatch.setitem(benchmark.SHAPE, key, value)
    benchmark.make_model(tmp_path)
    result = overlap.measure(tmp_path, num_chunks=[4], chunk_tokens=16, rounds=1, num_layer_groups=2)
    block_bytes = 2 * 2 * 16 * 2 * 16 * 2  # layers, key and value, tokens, KV heads, their size, bfloat16
    (by_transport,) = result.values()
    assert set(by_transport) == {"shared_memory", "grpc"}
    for told in by_transport.values():
        assert (told["bytes"], told["bytes_off"]) == (4 * block_bytes, block_bytes)
        assert 0 <= told["share_ahead"]["median"] <= 1
        assert told["prefill_s"]["median"] > 0
        assert told["prefill_off_s"]["median"] > 0


@pytest.mark.timeout(300)
def test_arrangements_get_the_same_requests_and_the_results_go_on_where_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"t": 100 * i, "in": 48, "out": 4, "hash": [0, 1, 2 + i], "block": 16} for i in range(6)]
    trace, file = tmp_path / "shared.jsonl", tmp_path / "results.json"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("split", "one unsplit")
    plan = Plan(6, repetitions=2, max_sweep_runs=2, shape={**TINY}, arrangements=names)
    workloads = [read_workload(trace, plan.num_requests)]
    with private_pdserve() as pdserve:
        for folder in ("XDG_RUNTIME_DIR", "RAY_TMPDIR"):
            monkeypatch.setenv(folder, str(pdserve.runtime))
        measure(plan, workloads, Results(file, plan, workloads))
    told = json.loads(file.read_text())
    for run in (*told["sweeps"], *told["runs"]):
        assert (run["num_requests"], run["errors"]) == (6, {})
        workers = {"split": {"prefill-0", "decode-0"}, "one unsplit": {"unsplit-0"}}[run["arrangement"]]
        assert set(run["stepping"]) == workers
        assert all(0 < share <= 1 for share in run["stepping"].values())
        assert run["cached_share"] < 0.7, "no prompts of an earlier run, but for the 32 tokens that all share"
    turns = [(run["repetition"], run["rate"], run["arrangement"]) for run in told["runs"]]
    assert turns == [(number, rate, name) for number in (0, 1) for rate in ("low", "high") for name in names]
    capsys.readouterr()
    measure(plan, workloads, Results(file, plan, workloads))
    assert capsys.readouterr().out == "all of it is measured already\n"


@needs_browser
async def test_the_live_page_is_watched_idle_and_busy() -> None:
    told = await live_page.measure(num_workers=4, seconds=0.5)
    runs = [(run["page"], run["slowdown"]) for run in told["runs"]]
    assert runs == [("idle", 1), ("everything changes", 1), ("everything changes", 4)]
    assert all(run["frames_per_s"] > 0 for run in told["runs"])


def test_it_tells_where_and_how_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["", "/home/somebody/traces", "--json", "results/new.json"])
    told = conditions("engine")
    assert told["command"] == "python -m benchmarks.engine traces --json results/new.json"
    assert {"commit", "measured_at", "hardware", "versions"} <= set(told)
