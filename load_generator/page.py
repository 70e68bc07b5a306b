"""A page of plots of one or several runs: one HTML file that needs nothing from outside."""

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load_generator.records import Record
from load_generator.report import Result, sweep_table, table
from pdserve.contract.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure that only the caller can draw."""

    caption: str
    draw: "Callable[[Axes], None]"


_MAX_POINTS = 5000
"""Of one scatter plot; more make the page slow and show nothing more."""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1b1f24; background: #fff }}
pre {{ overflow-x: auto; background: #f4f5f7; padding: 1rem; border-radius: 6px }}
figure {{ margin: 2rem 0 }} svg {{ max-width: 100%; height: auto }} figcaption {{ color: #57606a }}
</style></head><body><h1>{title}</h1>
"""


def write_page(path: Path, title: str, results: Sequence[Result], more: Sequence[Plot] = ()) -> None:
    """`more` plots follow those of the results. Raises ConfigError when matplotlib is not installed or the
    file cannot be written."""
    figures = [
        ("How long until the first token", _cumulative(results, "time to first token, ms", _first)),
        ("How long between two tokens", _cumulative(results, "inter-token time, ms", _between)),
        ("How long until the last token", _cumulative(results, "end to end, ms", _whole)),
        ("Over the run: each point is a request, where it was due", _over_time(results)),
    ]
    if len(results) > 1:
        figures.insert(0, ("Goodput and tail against the offered rate", _against_rate(results)))
        tables = [sweep_table(results)]
    else:
        tables = [table(result) for result in results]
    figures += [(plot.caption, _svg(plot.draw)) for plot in more]
    body = [_HEAD.format(title=html.escape(title))]
    body += [f"<pre>{html.escape(text)}</pre>" for text in tables]
    body += [f"<figure>{svg}<figcaption>{html.escape(text)}.</figcaption></figure>" for text, svg in figures]
    try:
        path.write_text("\n".join([*body, "</body></html>\n"]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): choose another --page") from error


def _cumulative(results: Sequence[Result], label: str, values_of: Callable[[Record], list[float]]) -> str:
    def draw(axes: "Axes") -> None:
        for result, colour in _coloured(results):
            good = [record for record in result.records if record.succeeded]
            values = sorted(value * 1000 for record in good for value in values_of(record))
            if values:
                shares = [(place + 1) / len(values) for place in range(len(values))]
                step = max(1, len(values) // _MAX_POINTS)
                axes.step(values[::step], shares[::step], where="post", label=_rate(result), color=colour)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("share")
        axes.set_ylim(0, 1)

    return _svg(draw)


def _over_time(results: Sequence[Result]) -> str:
    def draw(axes: "Axes") -> None:
        for result, colour in _coloured(results):
            good = [record for record in result.records if record.succeeded]
            good = good[:: max(1, len(good) // _MAX_POINTS)]
            due = [record.planned.due_s for record in good]
            waits = [record.time_to_first_token_s * 1000 for record in good]
            axes.scatter(due, waits, s=8, label=_rate(result), color=colour)
            failed = [record.planned.due_s for record in result.records if record.error is not None]
            axes.scatter(failed, [1.0] * len(failed), marker="x", color="black")
        axes.set_yscale("log")
        axes.set_xlabel("due at, s (crosses: failed)")
        axes.set_ylabel("time to first token, ms")

    return _svg(draw)


def _against_rate(results: Sequence[Result]) -> str:
    ordered = sorted(results, key=lambda result: result.summary.offered_rate)
    rates = [result.summary.offered_rate for result in ordered]

    def draw(axes: "Axes") -> None:
        axes.plot(rates, [result.summary.goodput for result in ordered], "o-", label="goodput, requests/s")
        axes.plot(rates, rates, ":", color="grey", label="offered")
        axes.set_xlabel("offered, requests/s")
        axes.set_ylabel("goodput, requests/s")
        tails = axes.twinx()
        for percent, style in ((50, "--"), (99, "-.")):
            waits = [result.summary.time_to_first_token for result in ordered]
            values = [wait.percentiles_ms[percent] if wait else None for wait in waits]
            tails.plot(rates, values, style, color="tab:red", label=f"time to first token p{percent}, ms")  # type: ignore[arg-type]
        tails.set_yscale("log")
        tails.set_ylabel("ms")

    return _svg(draw)


def _svg(draw: "Callable[[Axes], None]") -> str:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'pdserve[bench]', or leave out --page"
        ) from error
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    for each in figure.axes:
        for axis in (each.xaxis, each.yaxis):
            if axis.get_scale() == "log":  # 20 and 300, not powers of ten
                axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
                axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
    figure.legend(loc="outside right upper")
    content = io.StringIO()
    figure.savefig(content, format="svg")
    text = content.getvalue()
    return text[text.index("<svg") :]


def _coloured(results: Sequence[Result]) -> list[tuple[Result, tuple[float, ...]]]:
    """From dark to light with the rate."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"].resampled(len(results) + 1)
    ordered = sorted(results, key=lambda result: result.summary.offered_rate)
    return [(result, colours(place)) for place, result in enumerate(ordered)]


def _rate(result: Result) -> str:
    return f"{result.summary.offered_rate:.3g} requests/s"


def _first(record: Record) -> list[float]:
    return [record.time_to_first_token_s]


def _between(record: Record) -> list[float]:
    return record.inter_token_s


def _whole(record: Record) -> list[float]:
    return [record.end_to_end_s]
