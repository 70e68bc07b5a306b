"""Dynamo's linear cost (its KV router): the least of

    prefill_load_scale * blocks to prefill, this prompt's uncached ones included, + blocks that decode holds

with `prefill_load_scale` 1, its default, and temperature 0: the minimum. Its disaggregated deployments choose
the decode worker without regard to cached prefixes, by the second term alone, and so does this.
"""

from collections.abc import Callable, Sequence

from router.placement.candidates import Candidate
from router.placement.policy import FleetView, Placement, PlacementRequest
from router.placement.separately import place_separately, turn_of

_PREFILL_LOAD_SCALE = 1.0


class DynamoCost:
    """Counted in tokens: every worker has blocks of the same size, so the order is the same."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        self._turn += 1

        def prefill_cost(candidate: Candidate) -> float:
            uncached = request.num_tokens - fleet.held.tokens(candidate)
            return (
                _PREFILL_LOAD_SCALE * (candidate.queued_prefill_tokens + uncached) + candidate.context_tokens
            )

        splits = len(fleet.prefill) > 0 and not request.alone
        return place_separately(
            request, fleet, self._least(_context if splits else prefill_cost), self._least(prefill_cost)
        )

    def _least(self, cost: Callable[[Candidate], float]) -> Callable[[Sequence[Candidate]], Candidate]:
        def pick(candidates: Sequence[Candidate]) -> Candidate:
            costs = [cost(each) for each in candidates]
            least = min(costs)
            return turn_of(
                [each for each, c in zip(candidates, costs, strict=True) if c == least], self._turn
            )

        return pick


def _context(candidate: Candidate) -> float:
    return candidate.context_tokens
