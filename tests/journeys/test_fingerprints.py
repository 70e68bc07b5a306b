"""Workers whose KV does not mean the same: never paired, and everybody is told why."""

import asyncio
import logging
from dataclasses import replace

import pytest

from controller.worker import Worker
from pdserve.clock import run_virtual
from pdserve.contract.messages import PairTransport, Role
from tests.contract.attacked_system import AttackedSystem
from tests.journeys.test_memory_system import prompt_of
from tests.memory_system import MemorySystem, greedy


class MixedSystem(MemorySystem):
    """The prefill workers have blocks of another size."""

    async def start_worker(self, name: str, role: Role, address: str = "") -> Worker:
        self._engine_options = {"block_size": 8 if role is Role.PREFILL else 4}
        return await super().start_worker(name, role, address)


def test_workers_of_other_block_sizes_are_not_paired(caplog: pytest.LogCaptureFixture) -> None:
    """The router compares what they say of themselves; the decode worker computes the prompt."""

    async def story() -> None:
        async with MixedSystem() as system:
            prompt = prompt_of(33)
            assert await system.generate(prompt, greedy(9)) == system.reference("decode-0", prompt, greedy(9))
            assert system.metric("prefill-0", "prompt_tokens_total") == 0
            assert system.router_metric("router_attempts_total") == 1
            await system.at_rest()

    with caplog.at_level(logging.WARNING, "router.links"):
        run_virtual(story())
    (warning,) = caplog.messages
    assert "cannot be paired" in warning
    assert "blocks of 8 tokens" in warning
    assert "blocks of 4 tokens" in warning


def test_a_source_that_refuses_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """It turns out to be another model than it said: the request goes on without it, and the router's log,
    its metrics and the status tell why."""

    async def story() -> None:
        async with MemorySystem() as system:
            speak_differently(system.workers["prefill-0"])
            prompt = prompt_of(33)
            for _ in range(2):
                assert await system.generate(prompt, greedy(9)) == system.expected(prompt, greedy(9))
                await system.clock.sleep(60)  # longer than a pair rests that has merely failed
            recoveries = {"cause": "fingerprint_mismatch"}
            assert system.router_metric("router_recoveries_total", **recoveries) == 1
            assert system.router_metric("router_attempts_total") == 3
            refused = {"reason": "fingerprint_mismatch"}
            assert system.metric("prefill-0", "refused_calls_total", **refused) == 1
            assert_told(system.workers["decode-0"].transports_in_use)
            await system.at_rest()

    with caplog.at_level(logging.WARNING, "router.journey"):
        run_virtual(story())
    (warning,) = caplog.messages
    assert warning.startswith("prefill-0 is not paired any more")


def test_a_replaced_source_is_asked_again() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            speak_differently(system.workers["prefill-0"])
            prompt = prompt_of(33)
            await system.generate(prompt, greedy(9))
            await system.bury(system.kill("prefill-0"))
            await system.start_worker("prefill-0", Role.PREFILL)
            system.push_members()
            await system.until_ready()
            other = prompt_of(33, seed=2)
            assert await system.generate(other, greedy(9)) == system.expected(other, greedy(9))
            (pair,) = system.workers["decode-0"].transports_in_use
            assert pair.transport == "grpc"
            await system.at_rest()

    run_virtual(story())


def test_a_source_that_refuses_over_grpc() -> None:
    async def story() -> None:
        async with AttackedSystem() as system:
            speak_differently(system.prefill)
            await system.serves()
            registry = system.router.registry
            recoveries = {"cause": "fingerprint_mismatch"}
            assert registry.get_sample_value("pdserve_router_recoveries_total", recoveries) == 1
            assert_told(system.decode.transports_in_use)

    asyncio.run(story())


def speak_differently(source: Worker) -> None:
    """As if another model ran there than the one that it named to the router."""
    source.calls._info = replace(source.calls._info, fingerprint="of another model")


def assert_told(pairs: list[PairTransport]) -> None:
    (pair,) = pairs
    assert (pair.source, pair.transport) == ("prefill-0", "none")
    assert "of another model" in pair.reason
    assert "block_size" in pair.reason
