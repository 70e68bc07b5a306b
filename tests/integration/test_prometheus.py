"""A real Prometheus that finds, scrapes and judges a real system under load."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from controller.bench import BenchOptions, run_bench
from load_generator.arrivals import Lengths
from tests.integration.conftest import RaySystem
from tools.boards import dashboards

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus (Debian: apt-get install prometheus)"
)


class Prometheus:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=10)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def close(self) -> None:
        self._http.close()

    def is_up(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False


def until(condition: Any, what: str, at_most_s: float = 60.0) -> None:
    deadline = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def prometheus(ray_system: RaySystem, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the shipped configuration and rules; only quicker, and at this system's address."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "rules.yml")]
    discovery = config["scrape_configs"][0]["http_sd_configs"][0]
    discovery["url"] = ray_system.pdserve.status()["targets_url"]
    discovery["refresh_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    command += ["--enable-feature=exemplar-storage"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        prometheus = Prometheus(f"http://{address}")
        until(prometheus.is_up, "Prometheus does not start")
        yield prometheus
        prometheus.close()
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def loaded(prometheus: Prometheus, ray_system: RaySystem) -> Prometheus:
    """After some load, seen by several scrapes, and judged by the rules."""
    until(
        lambda: len(prometheus.query('up{job="pdserve"} == 1')) == 4,
        "not all are found and scraped",
    )
    lengths = Lengths(60, 8, num_shared_tokens=32)
    options = BenchOptions(url=ray_system.url, rate=8.0, count=40, lengths=lengths)
    assert asyncio.run(run_bench(options)) == 0
    recorded = "pdserve:time_to_first_token_seconds:p99"
    until(lambda: [s for s in prometheus.query(recorded) if s["value"][1] != "NaN"], "no rule was evaluated")
    until(lambda: prometheus.query("pdserve:slo_burn:slow"), "no rule of objectives was evaluated")
    return prometheus


def test_the_configuration_and_the_rules_are_valid() -> None:
    for arguments in (["rules", "rules.yml"], ["config", "prometheus.yml"]):
        done = subprocess.run(
            ["promtool", "check", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_burn_rates_of_known_runs() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(Path(__file__).parent / "slo_rules.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_process_is_found_under_its_own_name(loaded: Prometheus) -> None:
    instances = {
        sample["metric"]["instance"] for sample in loaded.query('up{job="pdserve", system="default"} == 1')
    }
    assert instances == {"router-0", "prefill-0", "decode-0", "controller"}


def queries() -> list[tuple[str, str]]:
    return [
        (f"{board.uid}/{panel.title}", expression)
        for board in dashboards()
        for panel in board.panels
        for _, expression in panel.queries
    ]


@pytest.mark.parametrize(("panel", "expression"), queries())
def test_every_panel_shows_data(loaded: Prometheus, panel: str, expression: str) -> None:
    samples = loaded.query(expression.replace("$system", ".+"))
    assert samples, f"{panel}: {expression}"
    assert any(sample["value"][1] != "NaN" for sample in samples), f"{panel}: {expression}"


def test_every_rule_is_evaluated_and_its_data_is_there(loaded: Prometheus) -> None:
    rules = [rule for group in loaded.get("rules")["groups"] for rule in group["rules"]]
    shipped = [
        rule
        for group in yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) == len(shipped)
    for rule in rules:
        assert rule["health"] == "ok", rule
    for rule in shipped:
        expression = rule["expr"]
        if "alert" in rule:  # without its threshold, which a healthy system does not pass
            expression = re.sub(r"\s(>|==)\s[\d.]+\s*$", "", expression.strip())
        quiet = ("refused_calls", "recoveries", "corrupt")  # counters that a healthy system never begins
        assert loaded.query(expression) or any(word in expression for word in quiet), rule


def test_slow_moments_name_their_requests(loaded: Prometheus, ray_system: RaySystem) -> None:
    now = time.time()
    found = loaded.get(
        "query_exemplars",
        query="pdserve_time_to_first_token_seconds_bucket",
        start=str(now - 600),
        end=str(now + 60),
    )
    named = {exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"]}
    assert named
    page, _, token = ray_system.pdserve.run("admin").stdout.split()[1].partition("#token=")
    headers = {"authorization": f"Bearer {token}"}
    for request_id in named:
        report = httpx.get(f"{page}requests/{request_id}", headers=headers).json()
        assert report["request_id"] == request_id


def test_prices_add_up(loaded: Prometheus) -> None:
    (running,) = loaded.query("pdserve:price_per_hour:sum")
    assert float(running["value"][1]) == 2.0 + 3.0 + 0.5


def test_utilisation_is_a_share(loaded: Prometheus) -> None:
    for name in ("engine_busy", "model_flops", "memory_bandwidth"):
        shares = [float(s["value"][1]) for s in loaded.query(f"max_over_time(pdserve:{name}:ratio[5m])")]
        assert len(shares) == 2, name  # of the two workers
        assert all(0 < share < 1 for share in shares), (name, shares)


def test_nothing_alarms_in_a_healthy_system(loaded: Prometheus) -> None:
    assert loaded.query('ALERTS{alertstate="firing"}') == []


def test_targets_are_what_prometheus_expects(ray_system: RaySystem) -> None:
    url = ray_system.pdserve.status()["targets_url"]
    answer = httpx.get(url)
    assert answer.headers["content-type"] == "application/json"
    groups = json.loads(answer.text)
    instances = [group["labels"]["instance"] for group in groups]
    assert instances == ["router-0", "prefill-0", "decode-0", "controller"]
    metrics = httpx.get(url.replace("/targets", "/metrics")).text
    assert 'pdserve_desired_workers{pool="prefill"} 1.0' in metrics
    assert 'pdserve_workers{pool="decode",state="ready"} 1.0' in metrics
    assert httpx.get(url.replace("/targets", "/else")).status_code == 404
