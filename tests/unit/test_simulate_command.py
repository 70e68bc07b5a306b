"""`pdserve simulate` on the command line."""

import json
from pathlib import Path

import pytest

from controller import cli

ROWS = [
    {"t": 0, "in": 1100, "out": 20, "hash": [1, 2, 3]},
    {"t": 4000, "in": 1100, "out": 20, "hash": [1, 2, 4]},
    {"t": 8000, "in": 1100, "out": 20, "hash": [5, 6, 7]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_json_is_one_object_on_standard_output(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--trace", str(trace), "--prefill", "2", "--decode", "1", "--ttft", "1000", "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["summary"]["num_succeeded"] == 3
    # The second request finds both whole blocks that its prompt shares with the first one's.
    assert result["prefix_hit_rate"] == pytest.approx(1024 / 3300)
    assert result["good_share"] == 1.0
    assert result["goodput_rps"] == pytest.approx(3 / result["summary"]["duration_s"])
    assert 0 < result["itl_p99_ms"] < result["ttft_p90_ms"] < 1000
    assert result["settings"]["prefill"] == 2


def test_the_table_says_where_the_times_come_from(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--trace", str(trace), "--limit", "2", "--unsplit", "1"]) == 0
    words = capsys.readouterr().out
    assert "2 of 2 requests succeeded" in words
    assert "roofline figures" in words


def test_a_faster_replay_waits_longer(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def first_token_ms(speed: str) -> float:
        words = ["simulate", "--trace", str(trace), "--unsplit", "1", "--device", "cpu-0.4b", "--json"]
        assert cli.main([*words, "--speed", speed]) == 0
        return float(json.loads(capsys.readouterr().out)["ttft_p90_ms"])

    assert first_token_ms("100") > first_token_ms("1")


def test_a_page_has_plots_of_the_workers(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["simulate", "--trace", str(trace), "--page", str(page)]) == 0
    content = page.read_text()
    assert content.count("<svg") == 7
    assert "Sequences that each worker decodes" in content


def test_calibrated_step_times_replace_those_of_the_device(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = {
        "fixed_s": 0.5,
        "per_prefill_token_s": 0.0,
        "per_decode_sequence_s": 0.0,
        "per_context_token_s": 0.0,
    }
    measured = tmp_path / "engine.json"
    measured.write_text(json.dumps({"calibrated_step_cost": cost}))
    words = ["simulate", "--trace", str(trace), "--unsplit", "1", "--calibration", str(measured), "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["itl_p50_ms"] == pytest.approx(500)


def test_a_calibration_that_is_none_is_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--trace", str(trace), "--calibration", str(trace)]) == 1
    assert "no result of python -m benchmarks.engine" in capsys.readouterr().err
