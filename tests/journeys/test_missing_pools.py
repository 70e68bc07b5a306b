"""A whole pool is gone: slower, said aloud, and the same tokens."""

import asyncio

import pytest

from pdserve.contract.messages import Role
from pdserve.contract.work import StepCost
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

COST = StepCost(0.01, per_prefill_token_s=0.005, per_decode_sequence_s=0.0)


def test_without_prefill_workers_decode_workers_compute_prompts_in_half_of_their_time() -> None:
    async def story() -> None:
        async with MemorySystem(num_blocks=400, cost=COST) as system:
            assert system.router_metric("router_degraded") == 0
            running = asyncio.create_task(system.generate(prompt_of(8), greedy(250)))
            await until(lambda: system.workers["decode-0"].loop.running_sequences == 1)
            dead = system.kill("prefill-0")
            await system.clock.sleep(0.1)
            assert system.router_metric("router_degraded") == 1
            assert system.router.readiness().ready
            assert system.router.readiness().reason.startswith("degraded")
            prompts = [prompt_of(150, seed=i) for i in range(2, 4)]
            started_at = system.clock.now()
            tasks = [asyncio.create_task(system.generate(p, greedy(1))) for p in prompts]
            outputs = await asyncio.gather(*tasks)
            took_s = system.clock.now() - started_at
            assert outputs == [system.expected(p, greedy(1)) for p in prompts]
            assert not running.done()
            assert took_s / (2 * 150 * COST.per_prefill_token_s) == pytest.approx(2, rel=0.1)
            assert await running == system.expected(prompt_of(8), greedy(250))
            await system.bury(dead)
            await system.start_worker("prefill-0", Role.PREFILL, "prefill-0:1")
            system.push_members()
            await system.until_ready()
            assert system.router_metric("router_degraded") == 0
            await system.at_rest()

    run_virtual(story())


def test_without_decode_workers_requests_wait_for_the_pool_to_be_refilled() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            prompt = prompt_of(30)
            task = asyncio.create_task(system.generate(prompt, greedy(40)))
            await until(lambda: system.workers["decode-0"].loop.running_sequences == 1)
            dead = system.kill("decode-0")
            await system.clock.sleep(20)
            assert system.router_metric("router_degraded") == 1
            assert not system.router.readiness().ready
            await system.bury(dead)
            await system.start_worker("decode-0", Role.DECODE)
            system.push_members()
            assert await task == system.expected(prompt, greedy(40))
            await system.at_rest()

    run_virtual(story())
