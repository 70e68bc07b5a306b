"""A page of plots of one simulated run: the load generator's, and what went on at the workers meanwhile."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from load_generator.page import Plot, write_page
from pdserve.contract.ids import WorkerId
from simulator.outcome import Outcome
from simulator.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_timelines(path: Path, title: str, outcome: Outcome, timeline: Timeline) -> None:
    """Raises ConfigError when matplotlib is not installed or the file cannot be written."""
    plots = [
        _lines(
            "Prompt tokens that each worker is still to compute",
            "tokens",
            timeline.at_s,
            timeline.waiting_tokens,
        ),
        _lines("Sequences that each worker decodes", "sequences", timeline.at_s, timeline.running_sequences),
        _lines("Share of each KV pool that requests hold", "share", timeline.at_s, timeline.held_share),
    ]
    write_page(path, title, [outcome.result], plots)


def _lines(
    caption: str, label: str, at_s: Sequence[float], values: Mapping[WorkerId, Sequence[float]]
) -> Plot:
    def draw(axes: "Axes") -> None:
        for worker_id, of_worker in values.items():
            axes.plot(at_s, of_worker, label=worker_id, linewidth=0.9)
        axes.set_xlabel("virtual time, s")
        axes.set_ylabel(label)

    return Plot(caption, draw)
