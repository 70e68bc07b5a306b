"""How long things took in the last minutes: percentiles from counts, without keeping what was measured.

Prometheus' histograms go back to the start of the process and need a server to be looked at; these forget,
and are for whoever looks at the router itself.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass, field

_GROWTH = 1.04
"""From one bucket's bound to the next: a percentile is off by at most 2 %."""
_LOG_GROWTH = math.log(_GROWTH)
_FIRST_S = 1e-5
"""Shorter times count as this."""

NUM_PERIODS = 30


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds; None where nothing was measured."""

    count: int
    p50_s: float | None = None
    p90_s: float | None = None
    p99_s: float | None = None


class RecentTimes:
    """Durations of the last NUM_PERIODS periods; `end_period` is called at the end of each. No clock, so that
    measuring costs no look at one."""

    def __init__(self) -> None:
        self._periods: deque[Counter[int]] = deque([Counter()], maxlen=NUM_PERIODS)  # bucket -> how many
        self.num_ever = 0
        """Since the start of the process."""

    def add(self, seconds: float, count: int = 1) -> None:
        """`count` things took `seconds` each."""
        self._periods[-1][_bucket(seconds)] += count
        self.num_ever += count

    def end_period(self) -> None:
        """Forgets the oldest period when there are more than NUM_PERIODS."""
        self._periods.append(Counter())

    def percentiles(self) -> Percentiles:
        counts: Counter[int] = Counter()
        for period in self._periods:
            counts.update(period)
        num = counts.total()
        if not num:
            return Percentiles(0)
        p50, p90, p99 = (_at_rank(counts, math.ceil(share * num)) for share in (0.5, 0.9, 0.99))
        return Percentiles(num, p50, p90, p99)


class RecentShare:
    """How many of the things that ended in the last NUM_PERIODS periods were good."""

    def __init__(self) -> None:
        self._periods: deque[Counter[bool]] = deque([Counter()], maxlen=NUM_PERIODS)
        self.num_good_ever = 0
        """Since the start of the process."""

    def add(self, good: bool) -> None:
        self._periods[-1][good] += 1
        self.num_good_ever += good

    def end_period(self) -> None:
        """Forgets the oldest period when there are more than NUM_PERIODS."""
        self._periods.append(Counter())

    @property
    def num(self) -> int:
        return sum(period.total() for period in self._periods)

    @property
    def num_good(self) -> int:
        return sum(period[True] for period in self._periods)


@dataclass(frozen=True, slots=True)
class RecentLatencies:
    """Of one router's requests. Each time means what the histogram of that name in `RouterMetrics` does."""

    time_to_first_token: RecentTimes = field(default_factory=RecentTimes)
    inter_token: RecentTimes = field(default_factory=RecentTimes)
    end_to_end: RecentTimes = field(default_factory=RecentTimes)
    good: RecentShare = field(default_factory=RecentShare)
    """By the objectives of `slo`."""

    def add_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` have come together `seconds` after the one before them: each took its part of that."""
        if num_tokens:
            self.inter_token.add(seconds / num_tokens, num_tokens)

    def end_period(self) -> None:
        for recent in (self.time_to_first_token, self.inter_token, self.end_to_end, self.good):
            recent.end_period()


def _bucket(seconds: float) -> int:
    return round(math.log(max(seconds, _FIRST_S) / _FIRST_S) / _LOG_GROWTH)


def _at_rank(counts: Counter[int], rank: int) -> float:
    """The `rank`-th shortest time, from 1."""
    passed = 0
    for bucket in sorted(counts):
        passed += counts[bucket]
        if passed >= rank:
            return _FIRST_S * _GROWTH**bucket
    raise AssertionError("the rank is at most the count")
