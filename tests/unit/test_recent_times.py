"""Percentiles over the last periods, against those of the measured values themselves."""

import random
import statistics

import pytest

from router.admin.rates import NUM_SAMPLES, Rates
from router.recent_times import NUM_PERIODS, Percentiles, RecentLatencies, RecentShare, RecentTimes


def test_nothing_measured_has_no_percentiles() -> None:
    assert RecentTimes().percentiles() == Percentiles(0)


def test_percentiles_are_those_of_the_values_within_a_bucket() -> None:
    draw = random.Random(3)
    values = [draw.lognormvariate(-3, 1.5) for _ in range(5000)]
    times = RecentTimes()
    for value in values:
        times.add(value)
    found = times.percentiles()
    cuts = statistics.quantiles(values, n=100)
    assert found.count == 5000
    for measured, percent in ((found.p50_s, 50), (found.p90_s, 90), (found.p99_s, 99)):
        assert measured == pytest.approx(cuts[percent - 1], rel=0.03)


def test_a_single_value_is_every_percentile() -> None:
    times = RecentTimes()
    times.add(0.25)
    found = times.percentiles()
    assert found.p50_s == found.p90_s == found.p99_s == pytest.approx(0.25, rel=0.02)


def test_old_periods_are_forgotten_and_the_total_is_not() -> None:
    times = RecentTimes()
    times.add(100.0, count=5)
    for _ in range(NUM_PERIODS - 1):
        times.end_period()
    times.add(0.001)
    assert times.percentiles().count == 6
    times.end_period()
    assert times.percentiles().count == 1
    assert times.percentiles().p99_s == pytest.approx(0.001, rel=0.02)
    assert times.num_ever == 6


def test_tokens_that_come_together_share_their_time() -> None:
    recent = RecentLatencies()
    recent.add_tokens(0.4, 4)
    recent.add_tokens(1.0, 0)
    found = recent.inter_token.percentiles()
    assert (found.count, found.p99_s) == (4, pytest.approx(0.1, rel=0.02))


def test_rates_are_those_of_the_last_samples() -> None:
    rates = Rates()
    assert rates.per_s("a") == 0
    rates.sample(10.0, {"a": 1000})
    assert rates.per_s("a") == 0
    for second in range(1, NUM_SAMPLES + 1):
        rates.sample(10.0 + second, {"a": 1000 + 7 * second, "b": 5})
    assert rates.per_s("a") == pytest.approx(7)
    assert rates.per_s("b") == 0
    assert rates.per_s("never seen") == 0


def test_a_share_forgets_what_is_older_than_its_periods() -> None:
    share = RecentShare()
    for good in (True, False, True):
        share.add(good)
    assert (share.num_good, share.num) == (2, 3)
    for _ in range(NUM_PERIODS):
        share.end_period()
        share.add(True)
    assert (share.num_good, share.num) == (NUM_PERIODS, NUM_PERIODS)
    assert share.num_good_ever == 2 + NUM_PERIODS
