"""Stories of the whole system in one process: real router, loops and hand-off over a fake engine."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from pdserve.clock import run_virtual as run_virtual_to_the_end
from pdserve.contract.errors import DeadlineExceeded, RequestTooLong, Unavailable
from pdserve.contract.messages import Role
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from router.requests import GenerateRequest
from tests.memory_system import MemorySystem, greedy

BLOCK = 4  # of the fake engine; its chunks are 8 tokens


def run_virtual(story: Coroutine[Any, Any, None]) -> None:
    """Run a story; one that is not over after two virtual minutes hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(120):
            await story

    run_virtual_to_the_end(bounded())


def prompt_of(length: int, seed: int = 1) -> list[int]:
    random = Random(seed)
    return [random.randrange(1, 999) for _ in range(length)]


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 31, 32, 33])
def test_tokens_equal_those_of_a_single_process(num_prefill: int, length: int) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=num_prefill) as system:
            prompt = prompt_of(length)
            for _ in range(2):  # cold, then with warm caches on both sides
                assert await system.generate(prompt, greedy(9)) == system.expected(prompt, greedy(9))
                await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_requests_with_shared_prefixes(temperature: float) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2, num_blocks=200) as system:
            sampling = SamplingParams(max_tokens=12, temperature=temperature)
            shared = prompt_of(17)
            prompts = [shared[: i % 18] + prompt_of(1 + i, seed=i) for i in range(32)]
            outputs = await asyncio.gather(
                *(system.generate(prompt, sampling, seed=i) for i, prompt in enumerate(prompts))
            )
            assert outputs == [system.expected(p, sampling, seed=i) for i, p in enumerate(prompts)]
            await system.at_rest()

    run_virtual(story())


def test_a_small_pool_preempts_and_the_tokens_stay_the_same() -> None:
    async def story() -> None:
        async with MemorySystem(num_blocks=12) as system:
            prompts = [prompt_of(10, seed=i) for i in range(6)]
            outputs = await asyncio.gather(*(system.generate(p, greedy(30)) for p in prompts))
            assert outputs == [system.expected(p, greedy(30)) for p in prompts]
            preemptions = system.workers["decode-0"].metrics.preemptions._value.get()
            assert preemptions > 0, "the story needs a preemption"
            await system.at_rest()

    run_virtual(story())


def test_only_missing_blocks_travel() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            prompt = prompt_of(33)
            deltas = []
            for _ in range(2):
                request = GenerateRequest(pack_tokens(prompt), greedy(2), seed=1)
                async for delta in system.router.generate(system.router.new_request_id(), request):
                    deltas.append(delta)
                await system.at_rest()
            cold, warm = (delta.timings for delta in deltas if delta.finish is not None)
            block_bytes = system.engines["decode-0"].info.block_bytes
            assert cold is not None
            assert cold.transfer_bytes == 9 * block_bytes
            assert warm is not None
            assert warm.transfer_bytes == block_bytes  # the block with the last token
            assert (warm.cached_prompt_tokens_decode, warm.cached_prompt_tokens_prefill) == (32, 32)

    run_virtual(story())


@pytest.mark.parametrize("killed", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at_s", [0.001, 0.006, 0.012, 0.02, 0.03, 0.05])
def test_a_killed_worker_costs_time_and_no_token(killed: str, at_s: float) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2) as system:
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, greedy(20))) for p in prompts]
            await system.clock.sleep(at_s)
            system.network.kill(killed)
            worker = system.workers.pop(killed)
            system.push_members()
            outputs = await asyncio.gather(*tasks)
            assert outputs == [system.expected(p, greedy(20)) for p in prompts]
            await system.at_rest()
            await worker.stop()

    run_virtual(story())


def test_a_prefill_pool_that_is_gone_makes_decode_workers_compute_prompts() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            await system.workers.pop("prefill-0").stop()
            system.push_members()
            prompt = prompt_of(20)
            assert await system.generate(prompt, greedy(5)) == system.expected(prompt, greedy(5))
            await system.at_rest()

    run_virtual(story())


def test_a_request_without_workers_waits_for_one() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            await system.workers.pop("decode-0").stop()
            system.push_members()
            prompt = prompt_of(20)
            task = asyncio.create_task(system.generate(prompt, greedy(5)))
            await system.clock.sleep(1)
            await system.start_worker("decode-1", Role.DECODE)
            system.push_members()
            assert await task == system.expected(prompt, greedy(5))

    run_virtual(story())


def test_waits_end() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            await system.workers.pop("decode-0").stop()
            system.push_members()
            with pytest.raises(DeadlineExceeded):
                await system.generate(prompt_of(5), greedy(5), deadline_s=2.0)
            assert system.clock.now() < 3
            with pytest.raises(Unavailable, match="no decode worker"):
                await system.generate(prompt_of(5), greedy(5))

    run_virtual(story())


def test_a_deadline_holds_for_a_client_that_reads_slowly() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            request = GenerateRequest(pack_tokens(prompt_of(20)), greedy(9), 1, deadline_s=1.0)
            deltas = system.router.generate(system.router.new_request_id(), request)
            for _ in range(3):
                await anext(deltas)
                await system.clock.sleep(0.4)  # everything has been generated long before
            with pytest.raises(DeadlineExceeded):
                await anext(deltas)

    run_virtual(story())


def test_what_can_never_fit_is_refused_at_once() -> None:
    async def story() -> None:
        async with MemorySystem(num_blocks=8) as system:
            with pytest.raises(RequestTooLong, match=r"35 tokens were asked for.* holds 32 tokens"):
                await system.generate(prompt_of(30), greedy(5))
            assert system.router_metric("router_attempts_total") == 0  # no worker was asked
            await system.at_rest()

    run_virtual(story())


def test_a_worker_that_names_blocks_in_another_way_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            other = await system.start_worker("decode-1", Role.DECODE)
            other._watches._hello = replace(other._watches._hello, root_digest=b"of another version")
            system.push_members()
            prompt = prompt_of(20)
            assert await system.generate(prompt, greedy(5)) == system.expected(prompt, greedy(5))
            assert not system.router.fleet.workers[other.worker_id].usable

    run_virtual(story())
    assert "decode-1 names blocks in another way than this router" in caplog.text


def test_workers_report_the_rates_that_their_engines_reach() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            await system.generate(prompt_of(33), greedy(9))
            await system.clock.sleep(2)  # the next reports
            loads = {name: view.load for name, view in system.router.fleet.workers.items()}
            cost = system.engines["prefill-0"].cost
            prefill, decode = loads["prefill-0"], loads["decode-0"]
            assert prefill is not None
            assert decode is not None
            assert prefill.prefill_tokens_per_s == pytest.approx(1 / cost.predict_s(1, 0))  # the last chunk
            assert decode.decode_step_s == pytest.approx(cost.predict_s(0, 1), rel=0.2)

    run_virtual(story())
