"""Placement by predicted seconds in whole systems: what is predicted comes true, in virtual time."""

import asyncio

import pytest

from pdserve.contract.ids import RequestId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepCost
from router.journey import JourneySettings
from router.report_json import decision_json, placement_text
from router.request_reports import AttemptReport
from router.requests import GenerateRequest
from router.router import RouterSettings
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

COST = StepCost(fixed_s=0.01, per_prefill_token_s=0.005, per_decode_sequence_s=0.001)


def predicting_system(num_prefill: int, num_decode: int) -> MemorySystem:
    settings = RouterSettings(journey=JourneySettings(policy="predicted"))
    return MemorySystem(num_prefill, num_decode, num_blocks=400, router_settings=settings, cost=COST)


class Asked:
    """A request that runs."""

    def __init__(self, system: MemorySystem, length: int, max_tokens: int, seed: int = 0) -> None:
        self._system = system
        self.id: RequestId = system.router.new_request_id()
        self._request = GenerateRequest(pack_tokens(prompt_of(length, seed=seed)), greedy(max_tokens), 1)
        self.reading = asyncio.create_task(self._read())

    @property
    def attempt(self) -> AttemptReport:
        report = self._system.router.reports.find(self.id)
        assert report is not None
        return report.attempts[-1]

    @property
    def decodes(self) -> bool:
        report = self._system.router.reports.find(self.id)
        return report is not None and report.second_token_s is not None

    async def _read(self) -> None:
        async for _ in self._system.router.generate(self.id, self._request):
            pass


def off_by(attempt: AttemptReport) -> tuple[float, float]:
    """Actual over predicted time to the first and second token."""
    assert attempt.predicted is not None
    assert attempt.first_token_s is not None
    assert attempt.second_token_s is not None
    return (
        (attempt.first_token_s - attempt.submitted_s) / attempt.predicted.first_token_s,
        (attempt.second_token_s - attempt.submitted_s) / attempt.predicted.second_token_s,
    )


def test_an_idle_system_answers_locally_and_a_busy_decode_worker_gets_help() -> None:
    async def story() -> None:
        async with predicting_system(1, 1) as system:
            first = Asked(system, 80, 200, seed=1)
            await until(lambda: first.decodes)
            assert first.attempt.prefill_worker is None
            second = Asked(system, 80, 5, seed=2)
            await second.reading
            assert second.attempt.prefill_worker == "prefill-0"
            assert second.attempt.runner_up is not None
            assert second.attempt.runner_up.prefill is None
            for asked in (first, second):
                assert off_by(asked.attempt) == pytest.approx((1, 1), rel=0.15)
            await first.reading
            await system.at_rest()
            for way in ("local", "split"):
                for token in ("first", "second"):
                    labels = {"token": token, "placement": way}
                    assert system.router_metric("router_prediction_ratio_count", **labels) == 1

    run_virtual(story())


def test_a_decision_is_told_with_what_came_of_it() -> None:
    async def story() -> None:
        async with predicting_system(1, 1) as system:
            asked = Asked(system, 40, 5)
            await asked.reading
            (decision,) = system.router.reports.decisions(10)
            told = decision_json(decision)
            assert (told["request_id"], told["attempt"]) == (asked.id, 1)
            assert (told["decode_worker"], told["prefill_worker"]) == ("decode-0", None)
            assert told["runner_up"]["prefill_worker"] == "prefill-0"
            assert told["actual"]["second_token_s"] == pytest.approx(
                told["predicted"]["second_token_s"], rel=0.15
            )
            report = system.router.reports.find(asked.id)
            assert report is not None
            seconds = told["predicted"]["second_token_s"]
            assert placement_text(report) == f"decode=decode-0;prefill=local;predicted={seconds:.4f}"
            await system.at_rest()

    run_virtual(story())


def test_the_end_of_a_prompt_is_computed_even_where_all_of_it_is_held() -> None:
    async def story() -> None:
        async with predicting_system(0, 1) as system:
            for _ in range(2):
                asked = Asked(system, 80, 5)  # 20 whole blocks
                await asked.reading
                await system.clock.sleep(1)
                assert off_by(asked.attempt) == pytest.approx((1, 1), rel=0.2)
            await system.at_rest()

    run_virtual(story())


def test_a_decode_worker_that_still_waits_for_the_kv_of_a_prompt_has_to_compute_it_like_any_other() -> None:
    """Although prompts alike are sent after the KV, where it is split."""

    async def story() -> None:
        async with predicting_system(2, 2) as system:
            first = Asked(system, 80, 300, seed=1)
            await until(lambda: first.decodes)
            siblings = []
            for _ in range(6):
                siblings.append(Asked(system, 200, 5, seed=2))
                await asyncio.sleep(0)
            for asked in siblings:
                await asked.reading
                assert asked.attempt.predicted is not None
                assert off_by(asked.attempt) < (1.15, 1.15), asked.attempt
            await first.reading
            await system.at_rest()

    run_virtual(story())


def test_twins_at_a_worker_that_computes_their_prompts_itself_compute_them_once() -> None:
    async def story() -> None:
        async with predicting_system(0, 1) as system:
            twins = [Asked(system, 200, 5) for _ in range(4)]
            for asked in twins:
                await asked.reading
                assert off_by(asked.attempt) == pytest.approx((1, 1), rel=0.15)
            reports = [asked.attempt.timings for asked in twins]
            assert [told and told.cached_prompt_tokens_decode for told in reports] == [0, 196, 196, 196]
            await system.at_rest()

    run_virtual(story())
