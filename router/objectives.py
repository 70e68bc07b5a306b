"""What a request has to keep to count as good, and whether it did. Pure.

The measures are those of `pdserve bench`, seen from the router: from the request's admission to the arrival
of its tokens here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pdserve.contract.errors import ErrorCode
from pdserve.contract.messages import CancelReason
from pdserve.contract.sampling import FinishReason


class Objective(StrEnum):
    TTFT = "ttft"
    """Time to first token."""
    TPOT = "tpot"
    """Mean time per output token after the first."""
    ITL = "itl"
    """The longest wait between two tokens."""
    E2E = "e2e"
    """From admission to the last token."""


_SERVED = {reason.value for reason in FinishReason} | {CancelReason.STOP_STRING.value}
_LEFT = {CancelReason.CLIENT_LEFT.value, CancelReason.CLIENT_TOO_SLOW.value}
_WRONGLY_ASKED = {
    code.value
    for code in (
        ErrorCode.INVALID_REQUEST,
        ErrorCode.NOT_FOUND,
        ErrorCode.REQUEST_TOO_LONG,
        ErrorCode.UNAUTHENTICATED,
    )
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast one request was served. Seconds; all but the gap from its admission."""

    first_token_s: float | None
    last_token_s: float | None
    longest_gap_s: float
    """Between two arrivals of tokens; 0 before the second."""
    num_output_tokens: int
    ended_s: float

    @property
    def time_per_output_token_s(self) -> float:
        """Mean over the tokens after the first; 0 where there are none."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Seconds; None: nothing is asked. A request is good that was answered to its end and kept them all."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None
    target: float = 0.99
    """The share of requests that is to be good."""

    @property
    def limits_s(self) -> Mapping[Objective, float]:
        """Those that are asked for."""
        all_limits = (self.ttft_s, self.tpot_s, self.itl_s, self.e2e_s)
        return {each: limit for each, limit in zip(Objective, all_limits, strict=True) if limit is not None}

    def judge(self, pace: Pace, outcome: str) -> "Verdict | None":
        """None for a request that says nothing about the service: its client asked for what cannot be, or
        left before anything was too slow. One that failed has missed everything. `outcome` is a finish
        reason, an error code, or why it was cancelled."""
        if outcome in _WRONGLY_ASKED:
            return None
        taken_s = _taken_s(pace, is_whole=outcome in _SERVED)
        kept = frozenset(each for each, limit_s in self.limits_s.items() if taken_s[each] <= limit_s)
        missed = frozenset(self.limits_s) - kept
        if outcome in _SERVED:
            return Verdict(not missed, kept, missed)
        if outcome in _LEFT:  # what it had kept so far it might have missed later
            return Verdict(False, frozenset(), missed) if missed else None
        return self.failed

    @property
    def failed(self) -> "Verdict":
        """On a request that got no answer, or not all of it."""
        return Verdict(False, frozenset(), frozenset(self.limits_s))


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one request."""

    good: bool
    kept: frozenset[Objective]
    missed: frozenset[Objective]


def _taken_s(pace: Pace, is_whole: bool) -> Mapping[Objective, float]:
    """What a request has taken, or what it had taken already when it ended early."""
    first_s = pace.ended_s if pace.first_token_s is None else pace.first_token_s
    last_s = pace.ended_s if pace.last_token_s is None else pace.last_token_s
    return {
        Objective.TTFT: first_s,
        Objective.TPOT: pace.time_per_output_token_s,
        Objective.ITL: pace.longest_gap_s if is_whole else max(pace.longest_gap_s, pace.ended_s - last_s),
        Objective.E2E: last_s if is_whole else pace.ended_s,
    }
