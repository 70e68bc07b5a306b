"""Dashboards, rules and runbook: generated, complete, and about metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import make_dashboards
from tools.boards import dashboards
from tools.panels import Dashboard

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
SUFFIXES = ("_bucket", "_sum", "_count")


def documented() -> set[str]:
    """Every series that docs/metrics.md, which is generated from the code, tells of."""
    names: set[str] = set()
    for name, kind in re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.M):
        names |= {name + suffix for suffix in SUFFIXES} if kind == "histogram" else {name}
    return names


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bpdserve_\w+", re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard.uid)
def test_every_panel_is_about_metrics_that_exist(dashboard: Dashboard) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for panel in dashboard.panels:
        assert panel.text.endswith(".")
        for _, expression in panel.queries:
            assert metrics_of(expression) <= documented(), panel.title
            assert set(re.findall(r"pdserve:[\w:]+", expression)) <= recorded, panel.title


def test_every_rule_is_about_metrics_that_exist() -> None:
    for rule in rules():
        assert metrics_of(rule["expr"]) <= documented(), rule


def test_every_documented_metric_but_those_of_rehearsals_is_on_a_dashboard_or_in_an_alert() -> None:
    panels = [panel for board in dashboards() for panel in board.panels]
    shown = " ".join(
        [expression for panel in panels for _, expression in panel.queries]
        + [rule["expr"] for rule in rules()]
    )
    for name in documented():
        base = re.sub("(_bucket|_sum|_count)$", "", name)
        assert base in shown or name == "pdserve_faults_total", name


def test_every_alert_has_a_paragraph_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == set(re.findall(r"^## (\w+)$", runbook, re.M))
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_committed_dashboards_are_the_generated_ones() -> None:
    for dashboard in dashboards():
        path = make_dashboards.FOLDER / f"{dashboard.uid}.json"
        assert path.read_text() == make_dashboards.as_json(dashboard)
        content = json.loads(path.read_text())
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in content["panels"]]
        assert len(set(places)) == len(places)
