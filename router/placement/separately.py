"""Placement by rules that choose the decode worker first and then a prefill worker for it."""

from collections.abc import Callable, Sequence

from router.placement.candidates import Candidate
from router.placement.policy import FleetView, Placement, PlacementRequest

Pick = Callable[[Sequence[Candidate]], Candidate]
"""The best of one or more candidates."""


def place_separately(
    request: PlacementRequest, fleet: FleetView, pick_decode: Pick, pick_prefill: Pick
) -> Placement | None:
    """A prefill worker is used whenever one fits; None when no decode worker can take the request."""
    fitting = [each for each in fleet.decode if each.pool_tokens >= request.most_tokens]
    if not fitting:
        return None
    decode = pick_decode(fitting)
    offered = () if request.alone else fleet.prefill
    sources = [each for each in offered if each.pool_tokens >= request.num_tokens]
    partners = [each for each in sources if fleet.may_pair(each, decode)]
    told = explain(decode, fleet)
    if not partners:
        why = f"local: {why_local(decode, sources)}; {told}"
        return Placement(decode.worker_id, None, why, request.num_tokens - fleet.held.tokens_here(decode))
    prefill = pick_prefill(partners)
    why = f"split: {explain(prefill, fleet)}; {told}"
    uncached = request.num_tokens - fleet.held.tokens(prefill)
    return Placement(decode.worker_id, prefill.worker_id, why, uncached)


def why_local(decode: Candidate, sources: Sequence[Candidate]) -> str:
    """Why none of `sources` can compute a prompt for `decode`."""
    if not sources:
        return "no prefill worker"
    if all(each.fingerprint != decode.fingerprint for each in sources):
        return f"no prefill worker has KV that fits {decode.worker_id} (model, revision, dtype, block size)"
    return "no prefill worker fits this decode worker now"


def explain(candidate: Candidate, fleet: FleetView) -> str:
    held = fleet.held.tokens(candidate)
    return f"{candidate.worker_id} holds {held}, queues {candidate.queued_tokens}"


def turn_of(candidates: Sequence[Candidate], turn: int) -> Candidate:
    """Equals take turns, in the order of their names."""
    return sorted(candidates, key=lambda each: each.worker_id)[turn % len(candidates)]
