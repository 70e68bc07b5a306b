"""What placement learns while a system runs: the pace of steps, the speed of KV, the length of outputs."""

import pytest

from pdserve.contract.ids import BlockId, WorkerId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SequenceStep, StepBatch, StepCost
from pdserve.engine.step_pace import StepPace
from router.kv_travel import FIRST_GUESS_S_PER_BYTE, KvTravel
from router.output_lengths import OutputLengths

COST = StepCost(
    fixed_s=0.01, per_prefill_token_s=0.001, per_decode_sequence_s=0.002, per_context_token_s=1e-5
)
PROMPT = SequenceStep(pack_tokens([1] * 100), 0, [BlockId(0)])
ROW = SequenceStep(pack_tokens([1]), 500, [BlockId(0)], as_decode=True)
P0, P1, D0 = WorkerId("p0"), WorkerId("p1"), WorkerId("d0")


def test_the_pace_of_prompts_and_of_decoding_are_learnt_apart() -> None:
    pace = StepPace(COST)
    assert (pace.prefill_slowdown, pace.decode_slowdown) == (1, 1)
    for _ in range(500):
        pace.note(StepBatch([PROMPT]), 2 * 0.11)
        pace.note(StepBatch([ROW, ROW]), 3 * (0.01 + 2 * 0.002 + 1000 * 1e-5))
        pace.note(StepBatch([ROW, PROMPT]), 100.0)
    assert pace.prefill_slowdown == pytest.approx(2, rel=0.01)
    assert pace.decode_slowdown == pytest.approx(3, rel=0.01)


def test_one_hiccup_of_a_short_step_changes_little() -> None:
    pace = StepPace(COST)
    for _ in range(100):
        pace.note(StepBatch([ROW]), 0.017)
    pace.note(StepBatch([ROW]), 0.17)
    assert pace.decode_slowdown < 1.4


def timings(seconds: float, num_bytes: int, is_whole: bool = True) -> RequestTimings:
    return RequestTimings(transfer_s=seconds, transfer_bytes=num_bytes, transfer_is_whole=is_whole)


def test_kv_travels_as_fast_as_it_did_between_this_pair_and_else_as_between_all() -> None:
    travel = KvTravel()
    travel.set_size(bytes_per_token=1000)
    assert travel.speeds.seconds(P0, D0, 50) == pytest.approx(50 * 1000 * FIRST_GUESS_S_PER_BYTE)
    for _ in range(200):
        travel.note(P0, D0, timings(0.5, 10_000_000))
        travel.note(P0, D0, timings(9.0, 10, is_whole=False))
        travel.note(P0, D0, timings(0.0, 0))
    assert travel.speeds.seconds(P0, D0, 50) == pytest.approx(50 * 1000 * 0.5 / 1e7, rel=0.01)
    assert travel.speeds.seconds(P1, D0, 50) == pytest.approx(50 * 1000 * 0.5 / 1e7, rel=0.01)
    travel.note(P1, D0, timings(5.0, 10_000_000))
    assert travel.speeds.seconds(P1, D0, 50) > 5 * travel.speeds.seconds(P0, D0, 50)
    travel.forget(P0)
    assert travel.speeds.seconds(P0, D0, 50) == travel.speeds.default_s_per_token * 50


def test_outputs_are_expected_to_be_as_long_as_the_last_ones_but_not_longer_than_allowed() -> None:
    lengths = OutputLengths()
    for _ in range(500):
        lengths.note(40)
    for _ in range(500):
        lengths.note(0)  # refused, or failed before its first token
    assert lengths.expected(1000) == pytest.approx(40, rel=0.01)
    assert lengths.expected(7) == 7
    assert lengths.expected(0) == 1
