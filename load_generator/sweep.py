"""Which rates to try, to find the knee: the highest rate at which enough requests are good. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

GROWTH = 1.5
"""From one rate to the next while all goes well."""
PRECISION = 1.1
"""The search ends when a good and a bad rate are within this factor."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One run of a sweep."""

    rate: float
    """Requests per second offered."""
    good_share: float
    """Of the requests, that kept the SLO."""


@dataclass(frozen=True, slots=True)
class Knee:
    """Where the search ended."""

    good_rate: float | None
    """The highest rate that was good; None when none was."""
    bad_rate: float | None
    """The lowest rate above it that was not; None when none was tried."""


def find_knee(tried: Sequence[Tried], min_good_share: float) -> Knee:
    """What the runs so far tell. What is good above a bad rate is noise and does not count."""
    bad = min((run.rate for run in tried if run.good_share < min_good_share), default=None)
    good = [run.rate for run in tried if run.good_share >= min_good_share and (bad is None or run.rate < bad)]
    return Knee(max(good, default=None), bad)


def next_rate(
    tried: Sequence[Tried], first_rate: float, min_good_share: float, max_runs: int
) -> float | None:
    """The rate of the next run: growing until one is bad, then halving the gap; None when that is enough."""
    if not tried:
        return first_rate
    if len(tried) >= max_runs:
        return None
    knee = find_knee(tried, min_good_share)
    if knee.bad_rate is None:
        return (knee.good_rate or first_rate) * GROWTH
    if knee.good_rate is None:
        return knee.bad_rate / GROWTH
    if knee.bad_rate / knee.good_rate <= PRECISION:
        return None
    return float((knee.bad_rate * knee.good_rate) ** 0.5)
