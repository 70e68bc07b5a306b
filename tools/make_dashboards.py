"""Generate the Grafana dashboards in deploy/grafana/dashboards from tools/boards.py.

python -m tools.make_dashboards            write them
python -m tools.make_dashboards --check    fail when the committed files are not what would be written
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.boards import dashboards
from tools.panels import Dashboard, Panel

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "pdserve-prometheus"}
WIDTH, HEIGHT = 8, 8
"""Of a panel; Grafana's grid is 24 wide."""


def as_json(dashboard: Dashboard) -> str:
    """As Grafana imports it."""
    content = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["pdserve"],
        "schemaVersion": 39,
        "time": {"from": "now-15m", "to": "now"},
        "refresh": "5s",
        "templating": {"list": [_system_variable()]},
        "links": [{"type": "dashboards", "tags": ["pdserve"], "title": "pdserve", "keepTime": True}],
        "panels": list(_panels(dashboard.panels)),
    }
    return json.dumps(content, indent=1) + "\n"


def _system_variable() -> dict[str, Any]:
    query = "label_values(pdserve_desired_workers, system)"
    return {
        "name": "system",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "system"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panels(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    for place, panel in enumerate(panels):
        x, y = place % 3 * WIDTH, place // 3 * HEIGHT
        yield {
            "id": place + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.text,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "options": {
                "tooltip": {"mode": "multi"},
                "legend": {"displayMode": "list", "placement": "bottom"},
            },
            "targets": [
                _target(chr(ord("A") + i), legend, expression)
                for i, (legend, expression) in enumerate(panel.queries)
            ],
        }


def _target(ref_id: str, legend: str, expression: str) -> dict[str, Any]:
    return {
        "refId": ref_id,
        "datasource": DATASOURCE,
        "expr": expression,
        "legendFormat": legend,
        "exemplar": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    files = {FOLDER / f"{dashboard.uid}.json": as_json(dashboard) for dashboard in dashboards()}
    if not check:
        for path, content in files.items():
            path.write_text(content)
        return 0
    stale = [path.name for path, content in files.items() if not path.exists() or path.read_text() != content]
    stale += [path.name for path in FOLDER.glob("*.json") if path not in files]
    if stale:
        print(f"{', '.join(stale)}: stale; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
