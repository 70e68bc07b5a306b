"""Where a request goes, as tables; and who may come in."""

from collections.abc import Sequence
from typing import get_args

import pytest

from pdserve.clock import SeededRng
from pdserve.config import PolicyName
from pdserve.contract.errors import Overloaded
from pdserve.contract.ids import WorkerId
from pdserve.contract.work import StepCost
from router.admission import Admission, AdmissionLimits
from router.placement.candidates import Candidate, Held, Pool
from router.placement.policies import POLICIES, make_policy
from router.placement.policy import FleetView, Placement, PlacementRequest

COST = StepCost(fixed_s=0.005, per_prefill_token_s=0.001, per_decode_sequence_s=0.001)
BITS = {name: 1 << bit for bit, name in enumerate(("d0", "d1", "d2", "p0", "p1", "p2"))}


def candidate(name: str, queued: int = 0, fingerprint: str = "m", **fields: int) -> Candidate:
    """A prefill worker (p...) with `queued` prompt tokens, or a decode worker with a context of so many."""
    prefills = name.startswith("p")
    base = Candidate(
        worker_id=WorkerId(name),
        fingerprint=fingerprint,
        owner_bit=BITS[name],
        pool_tokens=1000,
        free_tokens=1000,
        num_requests=0,
        queued_prefill_tokens=queued if prefills else 0,
        running_sequences=0,
        context_tokens=0 if prefills else queued,
        num_cached_blocks=0,
        chunk_tokens=64,
        cost=COST,
    )
    return base._replace(**fields)


def view(
    decode: Sequence[Candidate],
    prefill: Sequence[Candidate] = (),
    held: dict[str, int] | None = None,
    unusable: frozenset[tuple[WorkerId, WorkerId]] = frozenset(),
) -> FleetView:
    """`held`: worker -> leading prompt tokens."""
    depths = sorted(((tokens, BITS[name]) for name, tokens in (held or {}).items()), reverse=True)
    return FleetView(Pool(decode), Pool(prefill), Held(depths), unusable)


def place(name: str, seen: FleetView, num_tokens: int = 100, alone: bool = False) -> Placement:
    placement = make_policy(name, SeededRng(1)).choose(PlacementRequest(num_tokens, 200, alone=alone), seen)
    assert placement is not None
    return placement


def test_the_configuration_names_every_policy() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)


def test_longest_prefix_weighs_tokens_held_against_tokens_queued() -> None:
    seen = view(
        [candidate("d0"), candidate("d1", queued=200)],
        [candidate("p0", queued=50), candidate("p1", queued=100)],
        {"d0": 10, "d1": 100, "p1": 64},
    )
    placement = place("longest_prefix", seen)
    assert (placement.decode, placement.prefill, placement.num_to_compute) == ("d0", "p1", 100 - 64)
    assert placement.reason == "split: p1 holds 64, queues 100; d0 holds 10, queues 0"


@pytest.mark.parametrize("name", ["longest_prefix", "round_robin", "least_loaded"])
def test_equals_take_turns(name: str) -> None:
    policy = make_policy(name, SeededRng(1))
    seen = view([candidate("d0"), candidate("d1")])
    chosen = [policy.choose(PlacementRequest(10, 20), seen) for _ in range(4)]
    names = [placed.decode for placed in chosen if placed]
    assert sorted(names[:2]) == ["d0", "d1"]
    assert names[2:] == names[:2]


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_usable_source_the_decode_worker_computes_the_prompt(name: str) -> None:
    decode = [candidate("d0")]
    for seen in (
        view(decode, held={"d0": 30}),
        view(decode, [candidate("p0", fingerprint="other")], {"d0": 30}),
        view(decode, [candidate("p0", pool_tokens=99)], {"d0": 30}),
        view(decode, [candidate("p0")], {"d0": 30}, frozenset({(WorkerId("p0"), WorkerId("d0"))})),
    ):
        placement = place(name, seen)
        assert (placement.prefill, placement.num_to_compute) == (None, 70)
        assert placement.reason.startswith("local: " if name == "predicted" else "local: no prefill worker")


@pytest.mark.parametrize("name", POLICIES)
def test_whatever_the_policy_its_choice_is_predicted(name: str) -> None:
    seen = view([candidate("d0")], [candidate("p0")], {"p0": 50})
    split = place(name, seen)
    alone = place(name, seen, alone=True)
    assert split.predicted is not None
    assert alone.predicted is not None
    assert (split.prefill, split.predicted.first_token_s) == ("p0", pytest.approx(0.050 + 0.005))
    assert (alone.prefill, alone.predicted.first_token_s) == (None, pytest.approx(0.100 + 2 * 0.005))


@pytest.mark.parametrize("name", POLICIES)
def test_a_suspect_uses_no_prefill_worker(name: str) -> None:
    assert place(name, view([candidate("d0")], [candidate("p0")]), alone=True).prefill is None


def test_the_reason_tells_why_no_worker_may_be_the_source() -> None:
    others = [candidate("p0", fingerprint="other"), candidate("p1", fingerprint="third")]
    placement = place("longest_prefix", view([candidate("d0")], others))
    assert "no prefill worker has KV that fits d0" in placement.reason
    assert "block size" in placement.reason


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_decode_worker_that_it_fits_there_is_no_placement(name: str) -> None:
    policy = make_policy(name, SeededRng(1))
    for decode in ([], [candidate("d0", pool_tokens=199)]):
        assert policy.choose(PlacementRequest(100, 200), view(decode, [candidate("p0")])) is None


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    policy = make_policy("power_of_two", SeededRng(1))
    seen = view([candidate("d0", queued=9), candidate("d1", queued=5), candidate("d2", queued=1)])
    chosen = [policy.choose(PlacementRequest(10, 20), seen) for _ in range(60)]
    names = [placed.decode for placed in chosen if placed]
    assert names.count("d0") == 0
    assert 0 < names.count("d1") < names.count("d2")  # one pair in three, against two in three


@pytest.mark.parametrize(
    ("held", "requests", "chosen"),
    [
        ({"d0": 31, "d1": 30}, (60, 0), "d0"),  # more than 0.3 of it, and the loads are 64 apart at most
        ({"d0": 30}, (0, 0), "d1"),  # too little: the smallest tree
        ({"d0": 100}, (65, 0), "d1"),  # out of balance
        ({"d0": 100}, (300, 201), "d0"),  # 99 apart, but not by half
    ],
)
def test_sglang_follows_the_cache_while_the_load_is_in_balance(
    held: dict[str, int], requests: tuple[int, int], chosen: str
) -> None:
    d0 = candidate("d0", num_requests=requests[0], num_cached_blocks=9)
    d1 = candidate("d1", num_requests=requests[1], num_cached_blocks=5)
    assert place("sglang_cache_aware", view([d0, d1], held=held)).decode == chosen


@pytest.mark.parametrize(
    ("held", "queued", "chosen"),
    [
        ({"p0": 40}, (30, 0), "p0"),  # 30 + 60 against 0 + 100
        ({"p0": 40}, (50, 0), "p1"),  # 50 + 60 against 0 + 100
    ],
)
def test_dynamo_adds_what_is_queued_and_what_is_not_cached(
    held: dict[str, int], queued: tuple[int, int], chosen: str
) -> None:
    prefill = [candidate("p0", queued[0]), candidate("p1", queued[1])]
    placement = place("dynamo", view([candidate("d0", queued=9), candidate("d1", queued=8)], prefill, held))
    assert (placement.decode, placement.prefill) == ("d1", chosen)


def test_a_pool_keeps_its_workers_in_the_order_of_their_load() -> None:
    pool = Pool([candidate("p0", queued=5), candidate("p1", queued=3), candidate("p2", queued=4)])
    assert [each.worker_id for each in pool] == ["p1", "p2", "p0"]
    pool.put(candidate("p1", queued=6))
    assert [each.worker_id for each in pool] == ["p2", "p0", "p1"]
    pool.remove(WorkerId("p0"))
    pool.remove(WorkerId("p0"))
    assert [each.worker_id for each in pool] == ["p2", "p1"]
    assert pool.get(WorkerId("p0")) is None


def test_admission_refuses_what_exceeds_its_bounds() -> None:
    admission = Admission(AdmissionLimits(max_requests=2, max_prompt_tokens=100, retry_after_s=3.0))
    admission.enter(1000)  # alone, anything may come in
    with pytest.raises(Overloaded, match="1000 prompt tokens") as refused:
        admission.enter(1)
    assert refused.value.info.retry_after_s == 3.0
    admission.leave(1000)
    admission.enter(50)
    admission.enter(50)
    with pytest.raises(Overloaded, match="2 requests are in progress"):
        admission.enter(1)
    admission.leave(50)
    admission.leave(50)
    assert (admission.num_requests, admission.num_prompt_tokens) == (0, 0)
