"""Plot the dashboards' queries as pictures, one for each dashboard, from a Prometheus that has seen a run.

python -m tools.plot_dashboards --prometheus http://127.0.0.1:9090 --minutes 5 FOLDER
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import matplotlib

from tools.boards import dashboards
from tools.panels import Dashboard, Panel

matplotlib.use("agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
NUM_POINTS = 240
MAX_LEGENDS = 12
"""More of them hide what they are about."""


class History:
    """What a Prometheus knows of the last minutes."""

    def __init__(self, url: str, minutes: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)
        self.start = time.time() - 60 * minutes
        self.seconds = 60 * minutes

    def series(self, expression: str) -> list[dict[str, Any]]:
        """Of all systems. Raises HTTPStatusError for what is no query."""
        parameters: dict[str, str | float] = {
            "query": expression.replace("$system", ".+"),
            "start": self.start,
            "end": self.start + self.seconds,
            "step": max(1.0, self.seconds / NUM_POINTS),
        }
        answer = self._http.get("/api/v1/query_range", params=parameters)
        result: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
        return result


def plot(dashboard: Dashboard, history: History, path: Path) -> None:
    """One picture with all panels, as they lie in Grafana."""
    rows = -(-len(dashboard.panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(18, 3.6 * rows), squeeze=False)
    figure.suptitle(dashboard.title)
    for panel, axis in zip(dashboard.panels, axes.flat, strict=False):
        _draw(panel, history, axis)
    for axis in axes.flat[len(dashboard.panels) :]:
        axis.set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def _draw(panel: Panel, history: History, axis: "Axes") -> None:
    axis.set_title(f"{panel.title} ({panel.unit})", fontsize=10)
    for legend, expression in panel.queries:
        for series in history.series(expression):
            points = [(float(at), float(value)) for at, value in series["values"]]
            seconds, values = zip(*((at - history.start, value) for at, value in points), strict=True)
            axis.plot(seconds, values, label=_filled_in(legend, series["metric"]), linewidth=1)
    if 0 < len(axis.lines) <= MAX_LEGENDS:
        axis.legend(fontsize=7)
    axis.set_xlim(0, history.seconds)
    top = axis.get_ylim()[1]
    axis.set_ylim(bottom=-0.03 * top)  # so that a line at 0 is seen


def _filled_in(legend: str, labels: Mapping[str, str]) -> str:
    """As Grafana does it: {{name}} becomes that label's value, or `name` where there is none."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], match[1]), legend)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    history = History(options.prometheus, options.minutes)
    for dashboard in dashboards():
        plot(dashboard, history, options.folder / f"{dashboard.uid}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
