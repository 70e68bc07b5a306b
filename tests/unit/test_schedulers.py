"""The pure decisions of both rooms, as tables."""

import pytest

from decode_worker.scheduler import choose_victim, may_reserve
from decode_worker.scheduler import plan_chunks as plan_beside_decode
from pdserve.contract.work import StepCost
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within, fill_step, next_chunk_stop
from prefill_worker.scheduler import plan_chunks, wants_more

COST = StepCost(fixed_s=0.01, per_prefill_token_s=0.001, per_decode_sequence_s=0.002)


@pytest.mark.parametrize(
    ("num_computed", "num_tokens", "stop"),
    [(0, 5, 5), (0, 32, 32), (0, 33, 32), (32, 33, 33), (16, 100, 32), (48, 100, 64), (96, 100, 100)],
)
def test_chunks_end_at_fixed_multiples(num_computed: int, num_tokens: int, stop: int) -> None:
    assert next_chunk_stop(PromptProgress(num_computed, num_tokens), 32) == stop


@pytest.mark.parametrize(
    ("budget_s", "longest", "chunk_tokens"),
    [(10.0, 512, 512), (0.3, 512, 256), (0.2, 512, 128), (0.01, 512, 64), (0.01, 32, 32), (0.2, 96, 96)],
)
def test_chunks_are_halved_to_keep_the_budget(budget_s: float, longest: int, chunk_tokens: int) -> None:
    assert chunk_tokens_within(budget_s, COST, longest) == chunk_tokens


@pytest.mark.parametrize(
    ("lengths", "budget_s", "stops"),
    [
        ([100], 0.001, [32]),  # the first always gets its chunk
        ([10, 10, 10], 0.031, [10, 10]),
        ([10, 10, 10], 0.2, [10, 10, 10]),
        ([32, 64, 5], 0.075, [32, 32]),
        ([], 0.2, []),
    ],
)
def test_a_step_is_filled_up_to_its_budget(lengths: list[int], budget_s: float, stops: list[int]) -> None:
    prompts = [PromptProgress(0, length) for length in lengths]
    assert plan_chunks(prompts, 32, COST, budget_s) == stops


def test_running_sequences_leave_less_of_the_budget() -> None:
    prompts = [PromptProgress(0, 10)] * 3
    assert plan_beside_decode(prompts, 32, COST, 0.2, num_decoding=0, num_context_tokens=0) == [10, 10, 10]
    assert plan_beside_decode(prompts, 32, COST, 0.2, num_decoding=90, num_context_tokens=0) == [10]


def test_a_step_never_exceeds_its_budget_by_more_than_the_first_chunk() -> None:
    prompts = [PromptProgress(0, length) for length in range(1, 60)]
    stops = fill_step(prompts, 32, COST, 0.1, spent_s=0.01)
    assert 0.01 + 0.001 * sum(stops) <= 0.1


@pytest.mark.parametrize(("in_line", "wanted"), [(0, True), (63, True), (64, False)])
def test_two_chunks_in_line_are_enough(in_line: int, wanted: bool) -> None:
    assert wants_more(in_line, 32) is wanted


@pytest.mark.parametrize(
    ("missing", "available", "running", "granted"),
    [(4, 4, 0, True), (5, 4, 0, False), (4, 5, 1, True), (4, 5, 2, False), (0, 0, 0, True)],
)
def test_running_sequences_keep_room_to_grow(
    missing: int, available: int, running: int, granted: bool
) -> None:
    assert may_reserve(missing, available, running, growth_reserve=1) is granted


@pytest.mark.parametrize(
    ("reserved", "running", "victim"),
    [(1, 3, "reserved"), (1, 1, "reserved"), (0, 3, "running"), (0, 1, None), (0, 0, None)],
)
def test_reservations_go_before_running_sequences_and_the_oldest_never(
    reserved: int, running: int, victim: str | None
) -> None:
    assert choose_victim(reserved, running) == victim
