"""A request that ends early, in every phase and for every reason, ends at once at both of its workers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from decode_worker.loop import DecodeLoop
from decode_worker.request import Phase
from pdserve.contract.errors import DeadlineExceeded
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepCost
from pdserve.handoff.prefill_job import JobState
from router.requests import GenerateRequest
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

STEP_S = 0.05
END_WITHIN_S = STEP_S + 0.1
"""How soon both sides' blocks must be free (docs/states.md): within a step and a moment."""
VICTIM, MAX_TOKENS = prompt_of(160), 400
"""20 chunks, then tokens for 20 s: it ends because it is ended, or not in time."""
OTHER, NUM_OTHER_OUTPUT = prompt_of(480, seed=5), 40


class Scene:
    """A system in which the victim, a request, has reached a certain phase."""

    def __init__(self, system: MemorySystem, deadline_s: float | None) -> None:
        self.system = system
        self._id = system.router.new_request_id()
        request = GenerateRequest(pack_tokens(VICTIM), greedy(MAX_TOKENS), 1, deadline_s=deadline_s)
        self._deltas = system.router.generate(self._id, request)
        self.reading = asyncio.create_task(self._read())

    async def leave(self) -> None:
        """What the edges do when a client has gone."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        await self._deltas.aclose()

    async def assert_it_ends_everywhere(self) -> None:
        """Soon no worker holds anything for the victim, nor has a call open for it."""
        started_at = self.system.clock.now()
        await until(lambda: not self._is_anywhere())
        assert self.system.clock.now() - started_at <= END_WITHIN_S

    async def _read(self) -> None:
        async for _ in self._deltas:
            pass

    def _is_anywhere(self) -> bool:
        workers = self.system.workers.values()
        owners = [owner for worker in workers for owner in worker.ledger.owners()]
        calls = [job.request.request_id for worker in workers for job in worker.calls.jobs]
        live = [
            each.submit.request_id for phase in Phase for each in decoding_loop(self.system).in_phase(phase)
        ]
        return self._id in [*calls, *live] or any(self._id in owner for owner in owners)


def decoding_loop(system: MemorySystem) -> DecodeLoop:
    loop = system.workers["decode-0"].loop
    assert isinstance(loop, DecodeLoop)
    return loop


def in_phase(system: MemorySystem, phase: Phase) -> bool:
    return any(each.num_prompt == len(VICTIM) for each in decoding_loop(system).in_phase(phase))


def job_is(system: MemorySystem, state: JobState) -> bool:
    jobs = system.workers["prefill-0"].calls.in_state(state)
    return any(job.num_prompt == len(VICTIM) for job in jobs)


REACHED: dict[str, Callable[[MemorySystem], bool]] = {
    "queued": lambda system: job_is(system, JobState.QUEUED) and in_phase(system, Phase.WAITING),
    "no room to receive": lambda system: job_is(system, JobState.QUEUED) and in_phase(system, Phase.WAITING),
    "prefilling": lambda system: job_is(system, JobState.READY) and in_phase(system, Phase.RECEIVING),
    "decoding": lambda system: in_phase(system, Phase.DECODING),
    "unsplit, waiting for room": lambda system: in_phase(system, Phase.WAITING),
    "unsplit, prefilling": lambda system: in_phase(system, Phase.PREFILLING),
    "unsplit, decoding": lambda system: in_phase(system, Phase.DECODING),
}
WAITING = ("queued", "no room to receive", "unsplit, waiting for room")
"""Phases in which another request is in the victim's way."""
FULL = ("no room to receive", "unsplit, waiting for room")
"""In these by the blocks that it holds."""


@asynccontextmanager
async def scene_at(phase: str, deadline_s: float | None = None) -> AsyncIterator[Scene]:
    """The victim has been in `phase` for two steps. Afterwards nothing is left, and others are served."""
    unsplit = phase.startswith("unsplit")
    num_blocks = 145 if phase in FULL else 400
    cost = StepCost(STEP_S, per_prefill_token_s=0.0, per_decode_sequence_s=0.0)
    async with MemorySystem(0 if unsplit else 1, num_blocks=num_blocks, cost=cost) as system:
        others = []
        if phase in WAITING:
            others.append(asyncio.create_task(system.generate(OTHER, greedy(NUM_OTHER_OUTPUT))))
            await system.clock.sleep(STEP_S)
        if phase in FULL:
            await until(lambda: decoding_loop(system).running_sequences == 1)
        scene = Scene(system, deadline_s)
        await until(lambda: REACHED[phase](system) or scene.reading.done())
        await system.clock.sleep(2 * STEP_S)
        assert REACHED[phase](system)
        yield scene
        expected = system.expected(OTHER, greedy(NUM_OTHER_OUTPUT))
        assert await asyncio.gather(*others) == [expected] * len(others)
        await system.at_rest()
        assert_little_was_done(phase, scene)


def assert_little_was_done(phase: str, scene: Scene) -> None:
    """Nobody went on with the victim: not with its prompt, and not with its output."""
    metric = scene.system.metric
    num_others = len(OTHER) if phase in WAITING else 0
    where = "decode-0" if phase.startswith("unsplit") else "prefill-0"
    num_computed = metric(where, "prompt_tokens_total") - num_others
    if phase in WAITING:
        assert num_computed == 0
    elif phase.endswith("prefilling"):
        assert 0 < num_computed < len(VICTIM)
    num_generated = metric("decode-0", "generated_tokens_total") - (phase in WAITING) * NUM_OTHER_OUTPUT
    assert num_generated < 40


def outcome_at_source(phase: str) -> str:
    return "sealed" if phase == "decoding" else "cancelled"


@pytest.mark.parametrize("phase", REACHED)
def test_a_client_that_leaves(phase: str) -> None:
    async def story() -> None:
        async with scene_at(phase) as scene:
            metric = scene.system.metric
            await scene.leave()
            await scene.assert_it_ends_everywhere()
            assert metric("decode-0", "worker_requests_total", outcome="cancelled") == 1
            if not phase.startswith("unsplit"):
                outcome = outcome_at_source(phase)
                assert metric("prefill-0", "prefill_calls_total", outcome=outcome) == 1
            assert scene.system.router_metric("router_requests_total", outcome="cancelled") == 1

    run_virtual(story())


DEADLINES_S = {phase: 2.0 if phase.endswith("decoding") else 0.6 for phase in REACHED}


@pytest.mark.parametrize("phase", REACHED)
def test_a_deadline_that_passes(phase: str) -> None:
    async def story() -> None:
        async with scene_at(phase, DEADLINES_S[phase]) as scene:
            with pytest.raises(DeadlineExceeded):
                await scene.reading
            await scene.assert_it_ends_everywhere()
            assert scene.system.router_metric("router_requests_total", outcome="deadline_exceeded") == 1

    run_virtual(story())


@pytest.mark.parametrize("phase", REACHED)
def test_a_deadline_that_passes_while_the_router_is_silent(phase: str) -> None:
    async def story() -> None:
        async with scene_at(phase, DEADLINES_S[phase]) as scene:
            system = scene.system
            system.network.cut("router-0", "decode-0")  # shorter than anybody needs to notice
            with pytest.raises(DeadlineExceeded):
                await scene.reading
            await scene.assert_it_ends_everywhere()
            assert system.metric("decode-0", "worker_requests_total", outcome="deadline_exceeded") == 1
            if not phase.startswith("unsplit"):
                outcome = outcome_at_source(phase)
                assert system.metric("prefill-0", "prefill_calls_total", outcome=outcome) == 1
            system.network.heal("router-0", "decode-0")

    run_virtual(story())
