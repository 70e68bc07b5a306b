"""SGLang's cache-aware policy (sglang-router, `cache_aware`), with its defaults.

Where the load is out of balance, the least loaded. Else the worker that holds most of the prompt, if that is
more than `_CACHE_THRESHOLD` of it, and the one with the smallest tree of cached prefixes if it is not. Load
is the number of requests. Its router keeps a tree of what it has sent; here the exact index stands for that.
"""

from collections.abc import Sequence

from router.placement.candidates import Candidate
from router.placement.policy import FleetView, Placement, PlacementRequest
from router.placement.separately import place_separately, turn_of

_CACHE_THRESHOLD = 0.3
_BALANCE_ABSOLUTE = 64
_BALANCE_RELATIVE = 1.5


class SglangCacheAware:
    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        self._turn += 1

        def pick(candidates: Sequence[Candidate]) -> Candidate:
            if _is_out_of_balance(candidates):
                return self._least(candidates, [each.num_requests for each in candidates])
            held = [fleet.held.tokens(each) for each in candidates]
            if max(held) > _CACHE_THRESHOLD * request.num_tokens:
                return self._least(candidates, [-tokens for tokens in held])
            return self._least(candidates, [each.num_cached_blocks for each in candidates])

        return place_separately(request, fleet, pick, pick)

    def _least(self, candidates: Sequence[Candidate], values: Sequence[int]) -> Candidate:
        least = min(values)
        equals = [each for each, value in zip(candidates, values, strict=True) if value == least]
        return turn_of(equals, self._turn)


def _is_out_of_balance(candidates: Sequence[Candidate]) -> bool:
    loads = [each.num_requests for each in candidates]
    most, fewest = max(loads), min(loads)
    return most - fewest > _BALANCE_ABSOLUTE and most > _BALANCE_RELATIVE * fewest
