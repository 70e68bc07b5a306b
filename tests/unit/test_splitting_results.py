"""What `benchmarks.splitting` makes of its runs: which rates and runs follow, and what the page says."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replay import SLOS, Workload, read_workload
from benchmarks.splitting_plan import USUAL, Plan, first_rate
from benchmarks.splitting_results import Results, common_rates, knee, knee_of
from load_generator.traces import PlannedRequest
from tools import splitting_plots
from tools.make_splitting_docs import PAGE, filled, read_results

PLAN = Plan(num_requests=3, repetitions=2)
REQUESTS = tuple(PlannedRequest(2.0 * i, 32, 4, (0, 1 + i), 16) for i in range(3))
WORKLOAD = Workload("chat", REQUESTS)


def run(**fields: Any) -> dict[str, Any]:
    """One that kept every SLO in 10 ms."""
    times = {"p50": 10.0, "p99": 10.0}
    keys = ("first_token_ms", "second_token_ms", "inter_token_ms")
    workers = ["prefill-0", "decode-0"] if fields["arrangement"] == "split" else ["unsplit-0"]
    told = {"workload": "chat", "good_share": dict.fromkeys(SLOS, 1.0), "cached_share": 0.5}
    told |= {"num_requests": 4, "wall_s": 2.0, "cores": {"router-0": 0.1, "generator": 0.1, "others": 0.5}}
    return {**told, "stepping": dict.fromkeys(workers, 0.25), **dict.fromkeys(keys, times), **fields}


def swept(arrangement: str, *tried: tuple[float, float, float]) -> list[dict[str, Any]]:
    """A sweep of (rate, share of good pace, share without stalls)."""
    shares = [(rate, dict(zip(SLOS, good, strict=True))) for rate, *good in tried]
    return [run(arrangement=arrangement, rate=rate, good_share=good) for rate, good in shares]


SWEEPS = [
    *swept("split", (4.0, 1.0, 1.0), (6.0, 0.95, 0.9), (9.0, 0.2, 0.1)),
    *swept("two unsplit", (4.0, 1.0, 0.7), (6.0, 0.89, 0.5), (5.0, 0.9, 0.6)),
    *swept("one unsplit", (4.0, 0.5, 0.5), (2.7, 0.6, 0.2)),
]


def results(tmp_path: Path, *runs: dict[str, Any]) -> Results:
    """Of `SWEEPS` and these runs."""
    found = Results(tmp_path / "results.json", PLAN, [WORKLOAD])
    found.sweeps.extend(SWEEPS)
    found.runs.extend(runs)
    found.write()
    return found


def test_workloads_are_the_first_requests_or_where_nothing_is_shared_some_of_all(tmp_path: Path) -> None:
    rows = [{"t": 1000 * i, "in": 20 + i, "out": 2} for i in range(10)]
    alone, sharing = tmp_path / "alone.jsonl", tmp_path / "sharing.jsonl"
    alone.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sharing.write_text("".join(json.dumps({**row, "hash": [7]}) + "\n" for row in rows))
    assert [request.num_prompt_tokens for request in read_workload(alone, 3).requests] == [20, 23, 26]
    assert [request.num_prompt_tokens for request in read_workload(sharing, 3).requests] == [20, 21, 22]
    assert read_workload(sharing, 3).name == "sharing"


def test_a_workload_keeps_its_pace_at_every_rate() -> None:
    assert [request.due_s for request in WORKLOAD.at_rate(4.0)] == [0.0, 0.25, 0.5]
    facts = {
        "num_requests": 3,
        "mean_prompt_tokens": 32,
        "mean_output_tokens": 4,
        "shared_share": round(2 / 6, 4),
    }
    assert WORKLOAD.facts() == facts


def test_the_knee_is_the_highest_rate_below_the_first_bad_one() -> None:
    assert [knee(SWEEPS, "chat", name) for name in USUAL] == [6.0, 5.0, 2.7]
    assert [knee_of(SWEEPS, "chat", name, "no stall") for name in USUAL] == [6.0, None, None]
    assert common_rates(SWEEPS, "chat", USUAL) == {"low": 2.16, "high": 6.0}


def test_a_sweep_begins_where_one_core_might_end(tmp_path: Path) -> None:
    found = Results(None, PLAN, [WORKLOAD])
    assert found.next_sweep_rate(WORKLOAD, "split") == first_rate(WORKLOAD) > 0
    assert not found.is_complete


def test_arrangements_take_turns_and_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    turns = [
        {"workload": "chat", "arrangement": name, "rate": rate, "repetition": number}
        for number in (0, 1)
        for rate in ("low", "high")
        for name in USUAL
    ]
    assert [missing.key for missing in results(tmp_path).missing()] == turns
    results(tmp_path, *(run(**key) for key in turns[:4]))
    again = Results(tmp_path / "results.json", PLAN, [WORKLOAD])
    assert [missing.key for missing in again.missing()] == turns[4:]
    assert [missing.requests_per_s for missing in again.missing()][:3] == [6.0, 6.0, 2.16]


def test_results_of_another_plan_are_left_alone(tmp_path: Path) -> None:
    results(tmp_path)
    with pytest.raises(SystemExit, match="another plan"):
        Results(tmp_path / "results.json", Plan(num_requests=4), [WORKLOAD])


def test_the_page_has_medians_spreads_and_ratios_of_pairs(tmp_path: Path) -> None:
    def first_token(arrangement: str, repetition: int, p50: float) -> dict[str, Any]:
        times = {"p50": p50, "p99": 99.0}
        return run(arrangement=arrangement, rate="low", repetition=repetition, first_token_ms=times)

    runs = [first_token("split", number, p50) for number, p50 in enumerate((10.0, 30.0, 40.0))]
    runs += [first_token("two unsplit", number, p50) for number, p50 in enumerate((20.0, 20.0, 20.0))]
    found = results(tmp_path, *runs)
    found.content["conditions"].append(
        {
            "commit": "0123456789",
            "measured_at": "2030-01-02T03:04:05Z",
            "hardware": {"cores": 2, "cpu": "a CPU"},
            "versions": {"torch": "9.9"},
            "command": "python -m benchmarks.splitting traces",
        }
    )
    page = filled(PAGE.read_text(), found.content)
    assert "| chat | 6.0 (6.0) | 5.0 (none) | 2.7 (none) |" in page
    assert "| chat, low: 2.16 | split | 2.2 (2.2 to 2.2) | 2.2 (2.2 to 2.2) | 30 (10 to 40) |" in page
    assert "| chat, low | two unsplit | 1.00 (0 of 3) | 1.50 (1 of 3) | 1.00 (0 of 3) |" in page
    assert "| 50% | 50 | prefill-0 25%, decode-0 25% |" in page
    assert "Commit 0123456, 2030-01-02, 2 cores of a CPU, torch 9.9;" in page
    assert filled(page, found.content) == page
    assert filled(page, {}) == filled(PAGE.read_text(), {})


def test_plots_know_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting_plots, "DOCS", tmp_path)
    found = results(tmp_path, *(run(arrangement=name, rate="low", repetition=0) for name in USUAL))
    assert not splitting_plots.are_of(found.content)
    splitting_plots.write(found.content)
    assert splitting_plots.are_of(found.content)
    found.runs.pop()
    assert not splitting_plots.are_of(found.content)


def test_the_committed_page_and_plots_are_of_the_committed_results() -> None:
    page = PAGE.read_text()
    assert filled(page, read_results()) == page
    assert splitting_plots.are_of(read_results())
