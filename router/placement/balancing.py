"""Policies that look at no cache: to compare with, and for prompts that share nothing."""

from collections.abc import Sequence

from pdserve.contract.ports import Rng
from router.placement.candidates import Candidate
from router.placement.policy import FleetView, Placement, PlacementRequest
from router.placement.separately import place_separately, turn_of


class RoundRobin:
    """Every worker in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        self._turn += 1
        return place_separately(request, fleet, self._pick, self._pick)

    def _pick(self, candidates: Sequence[Candidate]) -> Candidate:
        return turn_of(candidates, self._turn)


class LeastLoaded:
    """Fewest tokens to work through; ties rotate."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        self._turn += 1
        return place_separately(request, fleet, self._pick, self._pick)

    def _pick(self, candidates: Sequence[Candidate]) -> Candidate:
        least = min(each.queued_tokens for each in candidates)
        return turn_of([each for each in candidates if each.queued_tokens == least], self._turn)


class PowerOfTwo:
    """The one with fewer tokens to work through, of two drawn at random: Mitzenmacher, "The Power of Two
    Choices in Randomized Load Balancing" (1996)."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        return place_separately(request, fleet, self._pick, self._pick)

    def _pick(self, candidates: Sequence[Candidate]) -> Candidate:
        drawn = list(candidates)
        two = [drawn.pop(self._draw(len(drawn))) for _ in range(min(2, len(drawn)))]
        return min(two, key=lambda each: each.queued_tokens)

    def _draw(self, num: int) -> int:
        return self._rng.random_bits(32) % num
