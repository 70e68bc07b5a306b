"""Which requests are good, as a table; and that routers and the load generator mean the same."""

import random
from itertools import pairwise

import pytest

from load_generator.records import Record
from load_generator.summary import Slo
from load_generator.traces import PlannedRequest
from pdserve.config import SloConfig
from pdserve.contract.errors import ErrorCode
from router.objectives import Objective, Objectives, Pace

ALL = Objectives(ttft_s=1.0, tpot_s=0.1, itl_s=0.5, e2e_s=3.0)
GOOD = Pace(first_token_s=1.0, last_token_s=1.8, longest_gap_s=0.5, num_output_tokens=9, ended_s=1.8)
"""At the limit of everything but the end."""
NOTHING_YET = Pace(None, None, 0.0, 0, ended_s=0.4)


def missed(pace: Pace, outcome: str = "length", objectives: Objectives = ALL) -> set[str] | None:
    """None: not counted."""
    verdict = objectives.judge(pace, outcome)
    if verdict is None:
        return None
    assert verdict.good == (not verdict.missed and outcome in ("length", "stop"))
    assert not verdict.kept & verdict.missed
    return {each.value for each in verdict.missed}


@pytest.mark.parametrize(
    ("pace", "what"),
    [
        (GOOD, set()),
        (Pace(1.01, 1.8, 0.5, 9, 1.8), {"ttft"}),
        (Pace(1.0, 1.81, 0.5, 9, 1.81), {"tpot"}),
        (Pace(1.0, 1.8, 0.51, 9, 1.8), {"itl"}),
        (Pace(0.1, 3.1, 0.4, 90, 3.1), {"e2e"}),
        (Pace(0.1, 2.9, 0.4, 90, 3.5), set()),  # its last token was in time, whoever read it
        (Pace(2.0, 4.0, 1.0, 3, 4.0), {"ttft", "tpot", "itl", "e2e"}),
        (Pace(0.2, 0.2, 0.0, 1, 0.2), set()),  # one token has no pace
    ],
)
def test_answered_requests(pace: Pace, what: set[str]) -> None:
    assert missed(pace) == missed(pace, "stop") == what


def test_what_is_not_asked_for_is_not_judged() -> None:
    slow = Pace(50.0, 90.0, 30.0, 3, 90.0)
    assert missed(slow, objectives=Objectives()) == set()
    assert missed(slow, objectives=Objectives(e2e_s=80.0)) == {"e2e"}


@pytest.mark.parametrize("outcome", ["invalid_request", "request_too_long", "not_found", "unauthenticated"])
def test_requests_for_what_cannot_be_do_not_count(outcome: str) -> None:
    assert missed(GOOD, outcome) is None


@pytest.mark.parametrize(
    "code", [ErrorCode.DEADLINE_EXCEEDED, ErrorCode.UNAVAILABLE, ErrorCode.POISONOUS, ErrorCode.INTERNAL]
)
def test_failed_requests_have_missed_everything(code: ErrorCode) -> None:
    assert missed(GOOD, code.value) == {"ttft", "tpot", "itl", "e2e"}
    verdict = Objectives().judge(GOOD, code.value)
    assert verdict is not None
    assert not verdict.good


@pytest.mark.parametrize("outcome", ["cancelled", "client_too_slow"])
def test_a_client_that_leaves_counts_only_when_something_was_too_slow(outcome: str) -> None:
    assert missed(NOTHING_YET, outcome) is None
    assert missed(GOOD, outcome) is None
    assert missed(Pace(None, None, 0.0, 0, ended_s=1.2), outcome) == {"ttft"}
    assert missed(Pace(0.5, 0.9, 0.1, 5, ended_s=1.5), outcome) == {"itl"}  # nothing came for 0.6 s
    verdict = ALL.judge(Pace(None, None, 0.0, 0, ended_s=1.2), outcome)
    assert verdict is not None
    assert not verdict.kept  # what it had kept so far it might have missed later


def test_the_load_generator_judges_the_same_requests_the_same() -> None:
    draw = random.Random(5)
    slo = Slo(ttft_ms=500, tpot_ms=100, itl_ms=250, e2e_ms=2000)
    objectives = Objectives(0.5, 0.1, 0.25, 2.0)
    verdicts = []
    for _ in range(500):
        times = [draw.uniform(0.05, 0.7)]
        for _ in range(draw.randrange(25)):
            times.append(times[-1] + draw.uniform(0.01, draw.choice((0.15, 0.3))))
        record = Record(index=0, planned=PlannedRequest(0.0, 8, len(times)), sent_at=0.0, token_times=times)
        record.num_output_tokens, record.ended_at = len(times), times[-1]
        gaps = (after - before for before, after in pairwise(times))
        pace = Pace(times[0], times[-1], max(gaps, default=0.0), len(times), times[-1])
        verdict = objectives.judge(pace, "length")
        assert verdict is not None
        assert verdict.good == slo.is_kept(record)
        verdicts.append(verdict.good)
    assert 50 < sum(verdicts) < 450


def test_objectives_have_the_names_of_the_configuration() -> None:
    assert [f"{each.value}_ms" for each in Objective] == [
        name for name in SloConfig.model_fields if name != "target"
    ]
