"""What the router reports about single requests, after runs of which everything is known, in virtual time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from pdserve.contract.errors import PdserveError
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import CancelReason
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepCost
from router.request_reports import RequestReport, RequestState, StageName
from router.requests import Closing, GenerateRequest
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

STEP_S = 0.05
PROMPT, MAX_TOKENS = prompt_of(33), 9
"""Of 9 blocks, computed in 5 chunks."""


@asynccontextmanager
async def steady_system(num_prefill: int = 1, num_decode: int = 1) -> AsyncIterator[MemorySystem]:
    """Every step takes STEP_S, whatever is in it, and messages take no time."""
    cost = StepCost(STEP_S, per_prefill_token_s=0.0, per_decode_sequence_s=0.0)
    async with MemorySystem(num_prefill, num_decode, num_blocks=200, cost=cost) as system:
        yield system
        await system.at_rest()


class Asked:
    """A request that runs."""

    def __init__(self, system: MemorySystem, max_tokens: int = MAX_TOKENS, **fields: object) -> None:
        self.system = system
        self.id: RequestId = system.router.new_request_id()
        self.closing = Closing()
        self._request = GenerateRequest(pack_tokens(PROMPT), greedy(max_tokens), 1, **fields)  # type: ignore[arg-type]
        self.reading = asyncio.create_task(self._read())

    @property
    def report(self) -> RequestReport:
        report = self.system.router.reports.find(self.id)
        assert report is not None
        return report

    async def _read(self) -> None:
        deltas = self.system.router.generate(self.id, self._request, self.closing)
        with suppress(PdserveError):
            async for _ in deltas:
                pass

    async def leave(self) -> None:
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)


async def ask(system: MemorySystem, **fields: object) -> Asked:
    """A request that has been admitted."""
    asked = Asked(system, **fields)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    return asked


def stages(report: RequestReport) -> list[tuple[str, int, float, float | None]]:
    """In steps."""
    return [
        (
            stage.name.value,
            stage.attempt,
            pytest.approx(stage.start_s / STEP_S),
            None if stage.end_s is None else pytest.approx(stage.end_s / STEP_S),
        )
        for stage in report.stages
    ]


def test_a_split_request() -> None:
    async def story() -> None:
        async with steady_system() as system:
            before_s = system.clock.unix_time()
            asked = await ask(system)
            await asked.reading
            report = asked.report
            block_bytes = system.engines["decode-0"].info.block_bytes
            assert (report.state, report.outcome, report.message) == (RequestState.ENDED, "length", None)
            assert report.arrived_at == before_s
            assert (report.num_prompt_tokens, report.num_output_tokens) == (33, 9)
            assert (report.num_attempts, report.recoveries) == (1, {})
            # 5 chunks until the first token; then a step for each of the 8 others
            assert report.first_token_s == pytest.approx(5 * STEP_S)
            assert report.second_token_s == pytest.approx(6 * STEP_S)
            assert report.last_token_s == pytest.approx(13 * STEP_S)
            assert report.ended_s == pytest.approx(13 * STEP_S)
            (attempt,) = report.attempts
            assert (attempt.decode_worker, attempt.prefill_worker) == ("decode-0", "prefill-0")
            assert (attempt.end, attempt.message) == ("length", None)
            timings = attempt.timings
            assert timings is not None
            assert timings.transfer_is_whole
            assert (timings.transfer_bytes, timings.transport) == (9 * block_bytes, "grpc")
            assert timings.transport_reason
            assert (timings.queue_s, timings.prefill_s) == (pytest.approx(0), pytest.approx(5 * STEP_S))
            assert stages(report) == [
                ("router queue", 1, 0, 0),
                ("prefill queue", 1, 0, 0),
                ("prefill", 1, 0, 5),
                ("transfer", 1, 5, 5),
                ("decode", 1, 5, 13),
            ]

    run_virtual(story())


def test_an_unsplit_request_tells_how_long_its_prompt_took_too() -> None:
    async def story() -> None:
        async with steady_system(num_prefill=0) as system:
            first, second = Asked(system), Asked(system)
            await asyncio.gather(first.reading, second.reading)
            (attempt,) = first.report.attempts
            assert attempt.prefill_worker is None
            assert attempt.timings is not None
            assert not attempt.timings.transport
            assert stages(first.report) == [
                ("router queue", 1, 0, 0),
                ("prefill queue", 1, 0, 0),
                ("prefill", 1, 0, 5),
                ("decode", 1, 5, 13),
            ]

    run_virtual(story())


def test_a_request_that_recovers_names_both_attempts_and_the_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        async with steady_system(num_decode=2) as system:
            asked = await ask(system)
            await until(lambda: asked.report.num_output_tokens == 3)
            victim = asked.report.attempts[0].decode_worker
            other = {"decode-0": "decode-1", "decode-1": "decode-0"}[victim]
            worker = system.kill(victim)
            await asked.reading
            report = asked.report
            assert (report.outcome, report.num_output_tokens) == ("length", 9)
            assert (report.num_attempts, report.recoveries) == (2, {"worker_lost": 1})
            lost, served = report.attempts
            assert (lost.number, lost.decode_worker, lost.end) == (1, victim, "worker_lost")
            assert lost.message is not None
            assert victim in lost.message
            assert (served.number, served.decode_worker, served.end) == (2, other, "length")
            assert lost.ended_s is not None
            assert served.first_token_s is not None
            assert lost.ended_s <= served.submitted_s < served.first_token_s
            # the first attempt gave the client its first tokens
            assert report.first_token_s == lost.first_token_s == pytest.approx(5 * STEP_S)
            assert [stage.attempt for stage in report.stages] == [1] * 5 + [2] * 5
            await system.bury(worker)

    with caplog.at_level(logging.INFO, "router.request_log"):
        run_virtual(story())
    (line,) = [record.__dict__["fields"] for record in caplog.records if record.msg == "request ended"]
    assert (line["outcome"], line["attempts"], line["recoveries"]) == ("length", 2, "worker_lost:1")
    assert (line["prompt_tokens"], line["output_tokens"]) == (33, 9)
    assert line["first_token_s"] == pytest.approx(5 * STEP_S)


def test_a_lost_prefill_worker_is_named_too() -> None:
    async def story() -> None:
        async with steady_system(num_prefill=2) as system:
            asked = await ask(system)
            await system.clock.sleep(2.5 * STEP_S)
            victim = asked.report.attempts[0].prefill_worker
            assert victim is not None
            worker = system.kill(victim)
            await asked.reading
            lost, served = asked.report.attempts
            assert asked.report.recoveries == {"prefill_failed": 1}
            assert (lost.prefill_worker, lost.end, lost.timings) == (victim, "prefill_failed", None)
            assert served.prefill_worker not in (None, victim)
            assert [stage.name for stage in asked.report.stages][:2] == [
                StageName.ROUTER_QUEUE,
                StageName.PROMPT,
            ]
            await system.bury(worker)

    run_virtual(story())


def test_a_request_on_its_way() -> None:
    async def story() -> None:
        async with steady_system() as system:
            away = system.workers.pop("decode-0")
            system.push_members()
            asked = await ask(system)
            await system.clock.sleep(STEP_S)
            assert asked.report.state is RequestState.WAITING
            assert stages(asked.report) == [("router queue", 1, 0, None)]
            system.workers["decode-0"] = away
            system.push_members()
            await until(lambda: asked.report.state is not RequestState.WAITING)
            assert asked.report.state is RequestState.PROMPT
            assert [stage.name for stage in asked.report.stages] == [StageName.ROUTER_QUEUE, StageName.PROMPT]
            await until(lambda: asked.report.state is not RequestState.PROMPT)
            assert (asked.report.state, asked.report.outcome) == (RequestState.DECODING, None)
            await until(lambda: asked.report.num_output_tokens == 3)
            timings = asked.report.timings
            assert timings is not None
            assert timings.transfer_is_whole  # told long before the end
            assert timings.prefill_s == pytest.approx(5 * STEP_S)
            assert system.router.reports.running() == [asked.report]
            await asked.reading
            assert system.router.reports.running() == []
            assert system.router.reports.recent(10) == [asked.report]

    run_virtual(story())


@pytest.mark.parametrize("reason", [CancelReason.CLIENT_LEFT, CancelReason.STOP_STRING])
def test_a_request_that_is_closed_says_why(reason: CancelReason) -> None:
    async def story() -> None:
        async with steady_system() as system:
            asked = await ask(system, max_tokens=100)
            await until(lambda: asked.report.num_output_tokens == 3)
            asked.closing.reason = reason
            await asked.leave()
            assert (asked.report.outcome, asked.report.message) == (reason.value, None)
            assert [attempt.end for attempt in asked.report.attempts] == [reason.value]
            assert system.router.reports.running() == []

    run_virtual(story())


def test_a_request_that_fails_says_why() -> None:
    async def story() -> None:
        async with steady_system() as system:
            asked = await ask(system, max_tokens=100, deadline_s=6.5 * STEP_S)
            await asked.reading
            assert asked.report.outcome == "deadline_exceeded"
            assert asked.report.message == "the request's deadline has passed"
            assert [attempt.end for attempt in asked.report.attempts] == ["deadline_exceeded"]

    run_virtual(story())
