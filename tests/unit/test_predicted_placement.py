"""Placement by predicted seconds: by hand for single cases, by brute force for many."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import SeededRng
from pdserve.contract.ids import WorkerId
from pdserve.contract.work import StepCost
from router.placement.candidates import Candidate, Held, Pool
from router.placement.policy import FleetView, KvSpeeds, Placement, PlacementRequest
from router.placement.predicted import TIE_S, TIE_SHARE, Predicted

COST = StepCost(
    fixed_s=0.01, per_prefill_token_s=0.001, per_decode_sequence_s=0.002, per_context_token_s=1e-6
)
CHUNK = 100
KV_S_PER_TOKEN = 0.0001


def worker(number: int, **fields: object) -> Candidate:
    """An idle worker whose owner bit is 1 << number."""
    base = Candidate(
        worker_id=WorkerId(f"w{number}"),
        fingerprint="m",
        owner_bit=1 << number,
        pool_tokens=10_000,
        free_tokens=10_000,
        num_requests=0,
        queued_prefill_tokens=0,
        running_sequences=0,
        context_tokens=0,
        num_cached_blocks=0,
        chunk_tokens=CHUNK,
        cost=COST,
    )
    return base._replace(**fields)  # type: ignore[arg-type]


def view(
    decode: Sequence[Candidate], prefill: Sequence[Candidate], held: dict[int, int] | None = None
) -> FleetView:
    """`held`: worker's number -> leading prompt tokens."""
    depths = sorted(((tokens, 1 << number) for number, tokens in (held or {}).items()), reverse=True)
    return FleetView(Pool(decode), Pool(prefill), Held(depths), kv_speeds=KvSpeeds(KV_S_PER_TOKEN))


def place(seen: FleetView, request: PlacementRequest | None = None, seed: int = 1) -> Placement:
    placement = Predicted(SeededRng(seed)).choose(request or PlacementRequest(400, 500, 10.0), seen)
    assert placement is not None
    return placement


def test_an_idle_decode_worker_computes_the_prompt_itself() -> None:
    placement = place(view([worker(0)], [worker(1)]))
    assert (placement.decode, placement.prefill, placement.num_to_compute) == ("w0", None, 400)
    assert placement.predicted is not None
    # Four chunks of 100 tokens, 0.11 s each; then a step of one sequence of 400 tokens.
    assert placement.predicted.first_token_s == pytest.approx(0.44)
    assert placement.predicted.second_token_s == pytest.approx(0.44 + 0.01 + 0.002 + 0.0004)
    assert placement.predicted.harm_s == 0


def test_running_sequences_make_it_split() -> None:
    placement = place(view([worker(0, running_sequences=2, context_tokens=1000)], [worker(1)]))
    assert (placement.decode, placement.prefill) == ("w0", "w1")
    assert placement.predicted is not None
    # The KV travels 0.04 s beside a computation of 0.44 s: nothing of it shows.
    step_s = 0.01 + 3 * 0.002 + 1400e-6
    assert placement.predicted.first_token_s == pytest.approx(0.44)
    assert placement.predicted.second_token_s == pytest.approx(0.44 + step_s)
    assert placement.predicted.harm_s == pytest.approx(2 * 10 * (0.002 + 400e-6))
    assert placement.runner_up is not None
    assert placement.runner_up.prefill is None
    # In its place, both sequences would wait for the whole prompt.
    assert placement.runner_up.predicted.harm_s == pytest.approx(placement.predicted.harm_s + 2 * 0.44)


def test_a_long_queue_at_the_prefill_worker_makes_it_local_all_the_same() -> None:
    busy = worker(1, queued_prefill_tokens=2000)
    assert place(view([worker(0, running_sequences=2)], [busy])).prefill is None


def test_local_prompts_beside_sequences_take_their_share_of_the_time() -> None:
    half = worker(0, running_sequences=1, prefill_share=0.5)
    predicted = place(view([half], [])).predicted
    assert predicted is not None
    # The first chunk at once, the other three in half of the time.
    assert predicted.first_token_s == pytest.approx(0.11 + 0.33 / 0.5)


def test_kv_that_is_not_hidden_counts_for_the_second_token() -> None:
    slow = FleetView(Pool([worker(0, running_sequences=9)]), Pool([worker(1)]), kv_speeds=KvSpeeds(0.002))
    placement = place(slow)
    assert placement.prefill == "w1"
    assert placement.predicted is not None
    gap_s = placement.predicted.second_token_s - placement.predicted.first_token_s
    assert gap_s == pytest.approx((0.8 - 0.44) + 0.01 + 10 * 0.002 + 400e-6)


def test_a_prefill_worker_with_a_faster_way_is_worth_a_longer_queue() -> None:
    far, near = worker(1), worker(2, queued_prefill_tokens=20)
    speeds = KvSpeeds(0.1, {(WorkerId("w2"), WorkerId("w0")): 0.0001})
    seen = FleetView(Pool([worker(0, running_sequences=50)]), Pool([far, near]), kv_speeds=speeds)
    placement = place(seen)
    assert placement.prefill == "w2"
    assert placement.predicted is not None
    step_s = 0.01 + 51 * 0.002 + 400e-6
    assert placement.predicted.second_token_s == pytest.approx(0.03 + 0.44 + step_s)


@pytest.mark.parametrize(("queued", "chosen"), [(300, "w1"), (700, "w2")])
def test_a_hot_prefix_is_computed_elsewhere_when_its_owner_queues_for_longer(
    queued: int, chosen: str
) -> None:
    owner = worker(1, queued_prefill_tokens=queued)
    seen = view([worker(0, running_sequences=5)], [owner, worker(2)], {1: 390})
    assert place(seen).prefill == chosen


def test_a_full_decode_worker_is_avoided() -> None:
    full = worker(0, running_sequences=1, context_tokens=550, pool_tokens=600, free_tokens=50)
    roomy = worker(2, running_sequences=3, context_tokens=300)
    assert place(view([full, roomy], [worker(1)]), PlacementRequest(400, 500, 100.0)).decode == "w2"


def test_equals_share() -> None:
    policy = Predicted(SeededRng(1))
    seen = view([worker(0), worker(1)], [])
    chosen = [policy.choose(PlacementRequest(400, 500, 10.0), seen) for _ in range(200)]
    num_first = sum(placed is not None and placed.decode == "w0" for placed in chosen)
    assert 60 < num_first < 140


def brute_force(seen: FleetView, request: PlacementRequest) -> float:
    """The least score of all ways, written down once more from the formulas of the design."""
    best = math.inf
    for d in seen.decode:
        if d.pool_tokens < request.most_tokens:
            continue
        h_d = seen.held.tokens(d)
        step = (
            d.cost.fixed_s
            + d.cost.per_decode_sequence_s * (d.running_sequences + 1)
            + d.cost.per_context_token_s * (d.context_tokens + request.num_tokens)
        )
        growth = d.cost.per_decode_sequence_s + d.cost.per_context_token_s * request.num_tokens
        growth *= d.running_sequences * request.expected_output_tokens
        local = _compute(d, request.num_tokens - h_d)
        waiting = _compute(d, d.queued_prefill_tokens)
        if d.running_sequences == 0:
            best = min(best, waiting + local + step)
        for p in seen.prefill:
            if p.pool_tokens >= request.num_tokens and not request.alone:
                own = _compute(p, request.num_tokens - seen.held.tokens(p))
                travel = KV_S_PER_TOKEN * (request.num_tokens - h_d)
                best = min(best, _compute(p, p.queued_prefill_tokens) + max(own, travel) + step + growth)
    return best


def _compute(candidate: Candidate, num_tokens: int) -> float:
    chunks = math.ceil(num_tokens / candidate.chunk_tokens)
    return num_tokens * candidate.cost.per_prefill_token_s + chunks * candidate.cost.fixed_s


@st.composite
def fleets(draw: st.DrawFn, most: int) -> FleetView:
    """Decode workers that run nothing or so much that local prompts are out of the question."""
    num_decode, num_prefill = draw(st.integers(1, most)), draw(st.integers(1, most))
    tokens = st.integers(0, 1500)
    decode = [
        worker(
            number,
            queued_prefill_tokens=0 if running else draw(tokens),
            running_sequences=running,
            context_tokens=running * draw(tokens),
            pool_tokens=draw(st.sampled_from([300, 10_000])),
        )
        for number in range(num_decode)
        for running in [draw(st.sampled_from([0, 0, 400, 500]))]
    ]
    prefill = [
        worker(
            100 + number, queued_prefill_tokens=draw(tokens), pool_tokens=draw(st.sampled_from([300, 10_000]))
        )
        for number in range(num_prefill)
    ]
    numbers = st.sampled_from([*range(num_decode), *range(100, 100 + num_prefill)])
    return view(decode, prefill, draw(st.dictionaries(numbers, st.integers(1, 399))))


@settings(max_examples=100)
@given(fleets(6), st.booleans())
def test_small_fleets_against_all_ways(seen: FleetView, alone: bool) -> None:
    request = PlacementRequest(400, 500, 20.0, alone)
    _check(seen, request, TIE_S + TIE_SHARE * brute_force(seen, request))


@settings(max_examples=40)
@given(fleets(12))
def test_large_fleets_lose_little_by_their_short_lists(seen: FleetView) -> None:
    request = PlacementRequest(400, 500, 20.0)
    _check(seen, request, TIE_S + 0.1 * brute_force(seen, request))


def _check(seen: FleetView, request: PlacementRequest, tolerance_s: float) -> None:
    placement = Predicted(SeededRng(1)).choose(request, seen)
    best = brute_force(seen, request)
    if placement is None:
        assert not any(each.pool_tokens >= request.most_tokens for each in seen.decode)
        return
    assert placement.predicted is not None
    score = placement.predicted.second_token_s + placement.predicted.harm_s
    if best < math.inf:
        assert score <= best + tolerance_s + 1e-9
