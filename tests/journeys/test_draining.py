"""Workers that leave on purpose: they finish what they can, give back the rest, and no client notices."""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

from pdserve.clock import run_virtual as run_virtual_to_the_end
from pdserve.contract.errors import ErrorCode, Unavailable
from pdserve.contract.messages import Role, WorkerState
from pdserve.contract.sampling import SamplingParams
from tests.memory_system import MemorySystem, greedy

NEVER_S = 3600.0


def run_virtual(story: Coroutine[Any, Any, None]) -> None:
    """Run a story; one that is not over after two virtual minutes hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(120):
            await story

    run_virtual_to_the_end(bounded())


def prompt_of(length: int, seed: int = 1) -> list[int]:
    random = Random(seed)
    return [random.randrange(1, 999) for _ in range(length)]


def recoveries(system: MemorySystem, cause: ErrorCode) -> float:
    return system.router_metric("router_recoveries_total", cause=cause.value)


@pytest.mark.parametrize("leaver", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at_s", [0.001, 0.006, 0.012, 0.03, 0.05])
def test_with_time_enough_everything_is_finished_where_it_runs(leaver: str, at_s: float) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2, num_blocks=200) as system:
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, greedy(20))) for p in prompts]
            await system.clock.sleep(at_s)
            await system.drain(leaver, NEVER_S)
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(20)) for p in prompts]
            assert recoveries(system, ErrorCode.WORKER_LOST) == 0
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("leaver", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at_s", [0.001, 0.006, 0.012, 0.03, 0.05])
def test_what_is_left_at_the_deadline_goes_on_elsewhere(leaver: str, at_s: float, temperature: float) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2, num_blocks=200) as system:
            sampling = SamplingParams(max_tokens=20, temperature=temperature)
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, sampling)) for p in prompts]
            await system.clock.sleep(at_s)
            await system.drain(leaver, deadline_s=0.0)
            assert await asyncio.gather(*tasks) == [system.expected(p, sampling) for p in prompts]
            await system.at_rest()

    run_virtual(story())


def test_streams_in_full_flow_are_given_back_and_not_lost() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=1, num_decode=2, num_blocks=200) as system:
            prompts = [prompt_of(20, seed=i) for i in range(6)]
            tasks = [asyncio.create_task(system.generate(p, greedy(60))) for p in prompts]
            await system.clock.sleep(0.1)
            running = system.workers["decode-0"].loop.running_sequences
            assert running > 0, "the story needs streams that flow"
            await system.drain("decode-0", deadline_s=0.05)
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(60)) for p in prompts]
            assert recoveries(system, ErrorCode.DRAINING) == running
            assert recoveries(system, ErrorCode.WORKER_LOST) == 0
            await system.at_rest()

    run_virtual(story())


def test_a_worker_that_is_drained_gets_no_new_work() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=1, num_decode=2, num_blocks=200) as system:
            worker = system.workers["decode-0"]
            first = [asyncio.create_task(system.generate(prompt_of(9, seed=i), greedy(90))) for i in range(4)]
            await system.clock.sleep(0.1)
            held = len(worker.ledger.owners())
            worker.drain(NEVER_S)  # nobody tells the router but the worker itself
            later = [prompt_of(9, seed=i) for i in range(10, 16)]
            tasks = [asyncio.create_task(system.generate(p, greedy(9))) for p in later]
            await system.clock.sleep(0.05)
            assert worker.state is WorkerState.DRAINING
            assert len(worker.ledger.owners()) <= held
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(9)) for p in later]
            await asyncio.gather(*first)
            await system.drain("decode-0", NEVER_S)
            await system.at_rest()

    run_virtual(story())


def test_an_earlier_deadline_counts_and_a_later_one_does_not() -> None:
    async def story() -> None:
        async with MemorySystem(num_decode=2, num_blocks=200) as system:
            prompts = [prompt_of(9, seed=i) for i in range(4)]
            tasks = [asyncio.create_task(system.generate(p, greedy(150))) for p in prompts]
            await system.clock.sleep(0.1)
            system.workers["decode-0"].drain(NEVER_S)
            system.workers["decode-0"].drain(0.1)
            began_at = system.clock.now()
            await system.drain("decode-0", NEVER_S)
            assert system.clock.now() == pytest.approx(began_at + 0.1, abs=0.05)
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(150)) for p in prompts]
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("num_prefill", [0, 1])
def test_without_another_worker_requests_wait_for_the_replacement(num_prefill: int) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=num_prefill) as system:
            role = system.workers["decode-0"].role
            prompt = prompt_of(20)
            task = asyncio.create_task(system.generate(prompt, greedy(30)))
            await system.clock.sleep(0.05)
            await system.drain("decode-0", deadline_s=0.0)
            await system.clock.sleep(3)
            await system.start_worker("decode-0", role)
            system.push_members()
            assert await task == system.expected(prompt, greedy(30))
            await system.at_rest()

    run_virtual(story())


def test_planned_stops_are_not_held_against_a_request() -> None:
    """More of them than fruitless attempts are allowed, and than deaths make a suspect."""

    async def story() -> None:
        async with MemorySystem(num_prefill=1, num_decode=1) as system:
            prompt = prompt_of(60)
            task = asyncio.create_task(system.generate(prompt, greedy(5)))
            for _ in range(12):
                await system.clock.sleep(0.004)  # less than its first chunk takes
                await system.drain("decode-0", deadline_s=0.0)
                await system.start_worker("decode-0", Role.DECODE)
                system.push_members()
                await system.until_ready()
            assert await task == system.expected(prompt, greedy(5))
            assert system.router_metric("router_suspects_total") == 0
            await system.at_rest()

    run_virtual(story())


def test_nor_are_those_of_workers_whose_successors_leave_too() -> None:
    """As in one rollout after another."""

    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=1, num_blocks=200) as system:
            prompt = prompt_of(400)
            task = asyncio.create_task(system.generate(prompt, greedy(5)))
            for _ in range(6):
                await system.clock.sleep(0.02)
                (attempt,) = [report.attempts[-1] for report in system.router.reports.running()]
                assert attempt.prefill_worker is not None
                await system.drain(attempt.prefill_worker, deadline_s=0.0)
                await system.start_worker(attempt.prefill_worker, Role.PREFILL)
                system.push_members()
                await system.until_ready()
            assert await task == system.expected(prompt, greedy(5))
            assert system.router_metric("router_suspects_total") == 0
            await system.at_rest()

    run_virtual(story())


def test_a_worker_that_is_idle_leaves_at_once() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2) as system:
            began_at = system.clock.now()
            for name in ("prefill-1", "decode-1"):
                await system.drain(name, NEVER_S)
            assert system.clock.now() - began_at < 0.1
            prompt = prompt_of(20)
            assert await system.generate(prompt, greedy(5)) == system.expected(prompt, greedy(5))
            await system.at_rest()

    run_virtual(story())


class Revisions(MemorySystem):
    """Workers that are started later serve another model."""

    def serve_next(self, **engine: int) -> None:
        self._engine_options = engine or {"vocab_size": 500}


def test_an_answer_goes_on_with_the_model_that_began_it_or_ends_with_an_error() -> None:
    async def story() -> None:
        async with Revisions(num_prefill=1, num_decode=2, num_blocks=200) as system:
            prompt = prompt_of(20)
            expected = system.expected(prompt, greedy(60))
            long = asyncio.create_task(system.generate(prompt, greedy(60)))
            longer = asyncio.create_task(system.generate(prompt, greedy(600)))
            await system.clock.sleep(0.05)
            system.serve_next()
            for name in ("decode-0", "decode-1"):
                await system.drain(name, deadline_s=0.0 if name == "decode-0" else 0.4)
                await system.start_worker(name, Role.DECODE)
                system.push_members()
                await system.until_ready()
            assert await long == expected, "it was moved to the other worker that serves the same model"
            with pytest.raises(Unavailable, match="another model or revision"):
                await longer
            await system.at_rest()

    run_virtual(story())


def test_who_has_no_answer_yet_gets_it_from_the_next_model() -> None:
    async def story() -> None:
        async with Revisions(num_prefill=0, num_decode=1) as system:
            prompt = [token % 499 + 1 for token in prompt_of(60)]
            task = asyncio.create_task(system.generate(prompt, greedy(5)))
            await system.clock.sleep(0.004)
            role = system.workers["decode-0"].role
            await system.drain("decode-0", deadline_s=0.0)
            system.serve_next()
            await system.start_worker("decode-0", role)
            system.push_members()
            assert await task == system.reference("decode-0", prompt, greedy(5))
            await system.at_rest()

    run_virtual(story())


def test_what_workers_hold_is_counted_in_blocks_of_their_own_size() -> None:
    """In the middle of a rollout of another one."""

    async def story() -> None:
        async with Revisions(num_prefill=0, num_decode=3, num_blocks=400) as system:
            prompt = prompt_of(20)
            expected = system.expected(prompt, greedy(300))
            tasks = [asyncio.create_task(system.generate(prompt, greedy(300))) for _ in range(3)]
            await system.clock.sleep(0.05)
            system.serve_next(block_size=8)
            await system.drain("decode-0", deadline_s=0.0)
            await system.start_worker("decode-0", Role.UNSPLIT)
            system.push_members()
            await system.until_ready()
            await system.drain("decode-1", deadline_s=0.0)
            moved = [r.attempts[-1] for r in system.router.reports.running() if r.num_attempts > 1]
            last = [attempt.placement for attempt in moved if attempt.decode_worker == "decode-2"]
            assert last
            assert all("decode-2 holds 16, " in placement for placement in last), last
            assert await asyncio.gather(*tasks) == [expected] * 3
            await system.at_rest()

    run_virtual(story())


async def leave_and_come(system: MemorySystem, random: Random) -> None:
    """A worker leaves, or dies while it is leaving, and another takes its place."""
    name = random.choice(list(system.workers))
    worker = system.workers[name]
    if random.random() < 0.3:
        worker.drain(random.uniform(0.0, 0.1))
        await system.clock.sleep(random.uniform(0.0, 0.05))
        await system.bury(system.kill(name))
    else:
        await system.drain(name, random.choice([0.0, random.uniform(0.0, 0.1), NEVER_S]))
    await system.clock.sleep(random.uniform(0.0, 0.1))
    await system.start_worker(name, worker.role)
    system.push_members()


@pytest.mark.parametrize("seed", range(40))
def test_workers_come_and_go_at_any_moment(seed: int) -> None:
    async def story() -> None:
        random = Random(seed)
        sampling = SamplingParams(max_tokens=40, temperature=random.choice([0.0, 1.0]))
        async with MemorySystem(num_prefill=2, num_decode=2, num_blocks=120, seed=seed) as system:
            prompts = [prompt_of(random.randrange(1, 60), seed=i) for i in range(16)]
            expected = [system.expected(prompt, sampling) for prompt in prompts]

            async def ask(prompt: list[int]) -> list[int]:
                await system.clock.sleep(random.uniform(0.0, 1.0))
                return await system.generate(prompt, sampling)

            asking = [asyncio.create_task(ask(prompt)) for prompt in prompts]
            for _ in range(6):
                await system.clock.sleep(random.uniform(0.0, 0.2))
                await leave_and_come(system, random)
            assert await asyncio.gather(*asking) == expected
            await system.at_rest()

    run_virtual(story())
