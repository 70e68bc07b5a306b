"""The plots of docs/when-not-to-split.md. Each file says of which results it is."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.splitting_plan import RATES
from benchmarks.splitting_results import MIN_GOOD_SHARE, SWEPT_SLO

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = ("#0a7f6f", "#c4561e", "#5b5bb0", "#a8357d")
MARKERS = ("o", "s", "^", "D")
TIMES = {
    "first token p99, ms": ("first_token_ms", "p99"),
    "second token p50, ms": ("second_token_ms", "p50"),
    "inter-token p99, ms": ("inter_token_ms", "p99"),
}


def write(results: Mapping[str, Any]) -> None:
    """Draw all, where there are results."""
    for name, draw in _PLOTS.items():
        if results:
            (DOCS / name).write_text(_svg(draw(results), _digest(results)))


def are_of(results: Mapping[str, Any]) -> bool:
    """Whether the files are of these results. Their drawing is not compared: it differs between machines."""
    if not results:
        return True
    mark = _digest(results)
    return all((DOCS / name).exists() and mark in (DOCS / name).read_text() for name in _PLOTS)


def _sweeps(results: Mapping[str, Any]) -> Figure:
    """Share of good requests against the rate, a panel for each workload."""
    workloads = list(results["workloads"])
    figure = Figure(figsize=(2.6 * len(workloads), 2.8), layout="constrained")
    for place, workload in enumerate(workloads):
        axes: Any = figure.add_subplot(1, len(workloads), place + 1)
        for name, colour, marker in zip(results["arrangements"], COLOURS, MARKERS, strict=False):
            runs = [
                run for run in results["sweeps"] if (run["workload"], run["arrangement"]) == (workload, name)
            ]
            points = sorted((run["rate"], run["good_share"][SWEPT_SLO]) for run in runs)
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=name)
        axes.axhline(MIN_GOOD_SHARE, linestyle=":", color="grey")
        axes.set(title=workload, xlabel="requests/s", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        if not place:
            axes.set_ylabel("share that is good")
            figure.legend(loc="outside lower center", ncols=len(COLOURS))
    return figure


def _latency(results: Mapping[str, Any]) -> Figure:
    """Every run at the common rates as a point: rows are times, columns workloads."""
    workloads = list(results["workloads"])
    figure = Figure(figsize=(2.6 * len(workloads), 2.4 * len(TIMES)), layout="constrained")
    panels: Any = figure.subplots(len(TIMES), len(workloads), squeeze=False)
    for row, (label, (key, percentile)) in enumerate(TIMES.items()):
        for column, workload in enumerate(workloads):
            axes = panels[row][column]
            for group, rate in enumerate(RATES):
                first_x = (len(COLOURS) + 1) * group
                _draw_group(axes, results, (workload, rate), first_x, (key, percentile))
            axes.set_yscale("log")
            axes.set_xticks(
                [(len(COLOURS) + 1) * group + 1 for group in range(len(RATES))],
                [f"{rate} rate" for rate in RATES],
            )
            axes.grid(alpha=0.3, axis="y")
            axes.yaxis.set_major_formatter(matplotlib.ticker.LogFormatter(labelOnlyBase=False))
            axes.yaxis.set_minor_formatter(
                matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4))
            )
            if not row:
                axes.set_title(workload)
            if not column:
                axes.set_ylabel(label)
    num_names = len(results["arrangements"])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[:num_names], labels[:num_names], loc="outside lower center", ncols=len(COLOURS))
    return figure


def _draw_group(
    axes: Any,
    results: Mapping[str, Any],
    where: tuple[str, str],
    first_x: int,
    value: tuple[str, str],
) -> None:
    """The runs of one workload and rate, by their time and its percentile: a column of points for each
    arrangement, with their median."""
    key, percentile = value
    for place, name in enumerate(results["arrangements"]):
        runs = [
            run
            for run in results["runs"]
            if (run["workload"], run["rate"]) == where and run["arrangement"] == name
        ]
        values = sorted(run[key][percentile] for run in runs)
        xs = [first_x + place] * len(values)
        axes.plot(xs, values, MARKERS[place], markersize=4, alpha=0.6, color=COLOURS[place], label=name)
        if values:
            middle = values[len(values) // 2]
            axes.plot([first_x + place - 0.35, first_x + place + 0.35], [middle] * 2, color=COLOURS[place])


_PLOTS: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "splitting-sweeps.svg": _sweeps,
    "splitting-latency.svg": _latency,
}


def _svg(figure: Figure, digest: str) -> str:
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "splitting", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Description": digest})
    return content.getvalue()


def _digest(results: Mapping[str, Any]) -> str:
    return "results " + hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]
