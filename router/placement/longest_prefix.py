"""Most prompt tokens held minus tokens queued, for prefill and decode workers alike; ties rotate."""

from collections.abc import Sequence

from router.placement.candidates import Candidate
from router.placement.policy import FleetView, Placement, PlacementRequest
from router.placement.separately import place_separately, turn_of


class LongestPrefix:
    """Every token counts the same, held or queued. Splits whenever it can."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        self._turn += 1

        def pick(candidates: Sequence[Candidate]) -> Candidate:
            scores = [fleet.held.tokens(each) - each.queued_tokens for each in candidates]
            best = max(scores)
            equals = [each for each, score in zip(candidates, scores, strict=True) if score == best]
            return turn_of(equals, self._turn)

        return place_separately(request, fleet, pick, pick)
