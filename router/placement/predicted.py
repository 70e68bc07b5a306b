"""Placement by predicted seconds: the least of the time to the second token plus the harm to others.

Splitting and computing the prompt at the decode worker are both ordinary choices. Of large pools only a
short list is looked at (`shortlist`): those that hold most of the prompt, each time the least loaded of
equals, and the least loaded of all. Mooncake's Algorithm 1 (arXiv 2407.00079) is the nearest relative: it has
no local choice, no harm, and a threshold of its own for replicating hot prefixes. Here that follows from the
sum: where the queue of a prefix' owner costs more than recomputing it, another worker computes it, and holds
it from then on. (No path exists to fetch a prefix from a peer instead: a Prefill call computes what is
missing.)
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf
from typing import NamedTuple

from pdserve.contract.ports import Rng
from router.placement.candidates import Candidate, Held, Pool
from router.placement.policy import FleetView, Option, Placement, PlacementRequest
from router.placement.prediction import (
    Sink,
    Source,
    predict_local,
    predict_split,
    prefill_s,
    sink_of,
    source_of,
    transfer_s,
)

HARM_WEIGHT = 1.0
"""What a second of delay to a running sequence counts, against a second that this request waits."""
TIE_SHARE = 0.03
TIE_S = 0.0005
"""Options that differ by less than both together are as good as equal: the predictions are no better."""
NUM_LEAST_LOADED = 3
NUM_HOLDERS = 3
"""How many of each kind are on the short list of a pool."""


class Scored(NamedTuple):
    """A way to serve a request; the smallest score is the best. `source` None: local."""

    score_s: float
    sink: Sink
    source: Source | None


class Predicted:
    """`rng` chooses between the two best where they are as good as equal, so that equal workers share."""

    def __init__(self, rng: Rng, harm_weight: float = HARM_WEIGHT) -> None:
        self._rng = rng
        self._harm_weight = harm_weight

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        best, second = self._two_best(request, fleet)
        if best is None:
            return None
        if second is not None and _tied(best, second) and self._rng.random_bits(1):
            best, second = second, best
        return _placement(best, second, fleet)

    def _two_best(self, request: PlacementRequest, fleet: FleetView) -> tuple[Scored | None, Scored | None]:
        """Of the ways to serve a request that are on the short lists. Scores are summed up as in
        `prediction`, without a Prediction for each."""
        candidates = shortlist(fleet.decode, fleet.held, request.most_tokens)
        sinks = [sink_of(each, request, fleet.held) for each in candidates]
        sources = _sources(request, sinks, fleet)
        soonest_s = min([_takes_s(each) for each in sources], default=inf)
        best: Scored | None = None
        second: Scored | None = None
        best_s = second_s = inf
        for sink in sinks:
            for score_s, source in self._ways(sink, sources, soonest_s, fleet, second_s):
                if score_s < best_s:
                    second, second_s = best, best_s
                    best, best_s = Scored(score_s, sink, source), score_s
                elif score_s < second_s:
                    second, second_s = Scored(score_s, sink, source), score_s
        return best, second

    def _ways(
        self, sink: Sink, sources: Sequence[Source], soonest_s: float, fleet: FleetView, enough_s: float
    ) -> list[tuple[float, Source | None]]:
        """(score, who computes the prompt; None: `sink` itself). Left out is what cannot be better than
        `enough_s`: `soonest_s` is when the first of `sources` has computed the prompt."""
        weight = self._harm_weight
        candidate = sink.candidate
        after_s = sink.step_s + weight * sink.growth_harm_s
        ways: list[tuple[float, Source | None]] = []
        own_s = prefill_s(candidate, sink.num_to_compute)
        if own_s * (1 + weight * candidate.running_sequences) + after_s < enough_s:
            local = predict_local(sink)
            ways.append((local.second_token_s + weight * local.harm_s, None))
        if soonest_s + after_s >= enough_s:
            return ways
        for source in sources:
            if fleet.may_pair(source.candidate, candidate):
                travels_s = transfer_s(source, sink, fleet)
                starts_s = source.queue_s if source.queue_s > sink.room_s else sink.room_s
                takes_s = source.prefill_s if source.prefill_s > travels_s else travels_s
                ways.append((starts_s + takes_s + after_s, source))
        return ways


def _sources(request: PlacementRequest, sinks: Sequence[Sink], fleet: FleetView) -> list[Source]:
    """The short list of prefill workers. Where any may be paired with any, those are left out that both start
    later and take longer than another whose computation hides the KV's way to every sink."""
    if request.alone:
        return []
    listed = shortlist(fleet.prefill, fleet.held, request.num_tokens)
    sources = [source_of(each, request, fleet.held.tokens(each)) for each in listed]
    if len(sources) < 2 or fleet.unusable_pairs or len({each.fingerprint for each in listed}) > 1:
        return sources
    least = min(sources, key=_takes_s)
    if any(transfer_s(least, sink, fleet) > least.prefill_s for sink in sinks):
        return sources
    enough_s = _takes_s(least) * (1 + TIE_SHARE) + TIE_S
    return [
        each
        for each in sources
        if each.queue_s < least.queue_s or each.prefill_s < least.prefill_s or _takes_s(each) <= enough_s
    ]


def _takes_s(source: Source) -> float:
    return source.queue_s + source.prefill_s


def shortlist(pool: Pool, held: Held, least_pool_tokens: int) -> list[Candidate]:
    """The workers worth looking at whose pool takes so many tokens: of each depth of the prompt that somebody
    holds, the deepest first, the least loaded; and the least loaded of all."""
    if len(pool) <= NUM_LEAST_LOADED + NUM_HOLDERS:
        return [each for each in pool if each.pool_tokens >= least_pool_tokens]
    listed: dict[str, Candidate] = {}
    for each in chain(
        pool.least_loaded(NUM_LEAST_LOADED, least_pool_tokens), _holders(pool, held, least_pool_tokens)
    ):
        listed[each.worker_id] = each
    return list(listed.values())


def _holders(pool: Pool, held: Held, least_pool_tokens: int) -> Iterator[Candidate]:
    """The deeper a prefix, the more load its holder may have: who is more loaded than a deeper holder is no
    use."""
    num_found = 0
    load_s = inf
    for _, bits in held.depths:
        each = pool.least_loaded_of(bits, least_pool_tokens)
        if each is not None and each.load_s < load_s:
            yield each
            load_s = each.load_s
            num_found += 1
            if num_found == NUM_HOLDERS:
                return


def _tied(best: Scored, second: Scored) -> bool:
    return second.score_s - best.score_s <= TIE_S + TIE_SHARE * best.score_s


def _placement(best: Scored, second: Scored | None, fleet: FleetView) -> Placement:
    _, sink, source = best
    option = _option(best, fleet)
    runner_up = None if second is None else _option(second, fleet)
    if source is None:
        reason = f"local: {option.decode} computes {sink.num_to_compute} tokens"
        return Placement(option.decode, None, reason, sink.num_to_compute, option.predicted, runner_up)
    reason = (
        f"split: {option.prefill} computes {source.num_to_compute} tokens after {source.queue_s:.3f} s, "
        f"{option.decode} misses {sink.num_missing}"
    )
    return Placement(
        option.decode, option.prefill, reason, source.num_to_compute, option.predicted, runner_up
    )


def _option(scored: Scored, fleet: FleetView) -> Option:
    _, sink, source = scored
    if source is None:
        return Option(sink.candidate.worker_id, None, predict_local(sink))
    predicted = predict_split(source, sink, transfer_s(source, sink, fleet))
    return Option(sink.candidate.worker_id, source.candidate.worker_id, predicted)
