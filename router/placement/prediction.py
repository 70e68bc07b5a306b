"""How long the ways to serve a request would take, in seconds.

first token, split:   max(prompts queued at p, room at d) + this prompt at p
second token, split:  + what of the KV's way p's computation does not hide + a step of d
first token, local:   prompts queued at d + this prompt at d, both beside what decodes there
second token, local:  + a step of d
harm:                 by how much the sequences that run at d are delayed together: each of their steps to
                      come grows by one sequence, and a local prompt stands in their way
"""

from typing import NamedTuple

from pdserve.contract.work import StepCost
from router.placement.candidates import Candidate, Held
from router.placement.policy import FleetView, PlacementRequest, Prediction


class Source(NamedTuple):
    """A prefill worker, for one request."""

    candidate: Candidate
    num_to_compute: int
    queue_s: float
    """Until its turn."""
    prefill_s: float


class Sink(NamedTuple):
    """A decode worker, for one request."""

    candidate: Candidate
    num_missing: int
    """Tokens whose KV it does not hold."""
    num_to_compute: int
    """Tokens that it would compute itself."""
    room_s: float
    """Until its pool has room."""
    step_s: float
    """Of one of its steps, with this sequence."""
    growth_harm_s: float
    """What its running sequences lose together by one more."""


def source_of(candidate: Candidate, request: PlacementRequest, held_tokens: int) -> Source:
    num_to_compute = request.num_tokens - held_tokens
    cost, chunk = candidate.cost, candidate.chunk_tokens
    token_s, fixed_s, queued = cost.per_prefill_token_s, cost.fixed_s, candidate.queued_prefill_tokens
    return Source(
        candidate,
        num_to_compute,
        token_s * queued - fixed_s * (-queued // chunk),
        token_s * num_to_compute - fixed_s * (-num_to_compute // chunk),
    )


def sink_of(candidate: Candidate, request: PlacementRequest, held: Held) -> Sink:
    cost, running, num_tokens = candidate.cost, candidate.running_sequences, request.num_tokens
    growth_s = cost.per_decode_sequence_s + cost.per_context_token_s * num_tokens
    step_s = (
        cost.fixed_s
        + cost.per_decode_sequence_s * running
        + cost.per_context_token_s * candidate.context_tokens
        + growth_s
    )
    num_missing = num_tokens - held.tokens(candidate)
    num_to_compute = num_missing if held.here is None else num_tokens - held.tokens_here(candidate)
    room_s = 0.0
    if num_missing > candidate.free_tokens:
        room_s = _room_s(candidate, request, num_missing, step_s)
    growth_harm_s = running * growth_s * request.expected_output_tokens
    return Sink(candidate, num_missing, num_to_compute, room_s, step_s, growth_harm_s)


def transfer_s(source: Source, sink: Sink, fleet: FleetView) -> float:
    """How long the KV that `sink` misses travels from `source`."""
    pair = (source.candidate.worker_id, sink.candidate.worker_id)
    return fleet.kv_speeds.seconds(*pair, sink.num_missing)


def predict_split(source: Source, sink: Sink, transfer_s: float) -> Prediction:
    """`transfer_s`: how long the KV that `sink` misses travels; what is computed meanwhile hides it."""
    starts_s = max(source.queue_s, sink.room_s)
    second_s = starts_s + max(source.prefill_s, transfer_s) + sink.step_s
    return Prediction(starts_s + source.prefill_s, second_s, sink.growth_harm_s)


def predict_local(sink: Sink) -> Prediction:
    candidate = sink.candidate
    own_s = prefill_s(candidate, sink.num_to_compute)
    prompts_s = prefill_s(candidate, candidate.queued_prefill_tokens) + own_s
    running = candidate.running_sequences
    if running:
        prompts_s = _beside_decoding_s(candidate, prompts_s, sink.num_to_compute)
    first_s = sink.room_s + prompts_s
    return Prediction(first_s, first_s + sink.step_s, sink.growth_harm_s + running * own_s)


def prefill_s(candidate: Candidate, num_tokens: int) -> float:
    """Of so many prompt tokens, in steps of one chunk."""
    cost = candidate.cost
    return cost.per_prefill_token_s * num_tokens - cost.fixed_s * (-num_tokens // candidate.chunk_tokens)


def _beside_decoding_s(candidate: Candidate, prompts_s: float, num_tokens: int) -> float:
    """How long prompts of `prompts_s` seconds take where sequences decode. The first chunk may begin at once;
    what follows it gets the worker's share of the time for prompts, and at most what the decoding leaves."""
    cost = candidate.cost
    num_steps = -(-(candidate.queued_prefill_tokens + num_tokens) // candidate.chunk_tokens)
    rows_s = cost.predict_s(0, candidate.running_sequences, candidate.context_tokens) - cost.fixed_s
    together_s = prompts_s + num_steps * rows_s
    chunk_s = min(prompts_s, cost.predict_s(candidate.chunk_tokens, 0))
    return max(together_s, chunk_s + (prompts_s - chunk_s) / candidate.prefill_share)


def _room_s(candidate: Candidate, request: PlacementRequest, num_missing: int, step_s: float) -> float:
    """Until sequences that end have left `num_missing` tokens: all that is filled is left within the time of
    one output of the expected length."""
    filled = max(1, candidate.pool_tokens - candidate.free_tokens)
    output_s = request.expected_output_tokens * step_s
    return output_s * min(1.0, (num_missing - candidate.free_tokens) / filled)


def scaled(cost: StepCost, prefill_slowdown: float, decode_slowdown: float) -> StepCost:
    """A calibration corrected by how long steps really take."""
    return StepCost(
        cost.fixed_s * decode_slowdown,
        cost.per_prefill_token_s * prefill_slowdown,
        cost.per_decode_sequence_s * decode_slowdown,
        cost.per_context_token_s * decode_slowdown,
    )
