"""What the metrics say after runs of which everything is known, in virtual time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.exposition import generate_latest

from pdserve.contract.errors import Overloaded, RequestTooLong
from pdserve.contract.messages import Members, Role
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepCost
from pdserve.handoff.prefill_job import JobState
from pdserve.rpc.memory_rpc import MemoryNetwork
from router.admission import AdmissionLimits
from router.journey import JourneySettings
from router.objectives import Objectives
from router.requests import GenerateRequest
from router.router import RouterSettings
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

BLOCK, CHUNK = 4, 8  # of the fake engine
POOLS = ("prefill", "decode")
STEP_S = 0.05


@asynccontextmanager
async def steady_system(
    num_prefill: int = 1,
    num_decode: int = 1,
    network: MemoryNetwork | None = None,
    router_settings: RouterSettings | None = None,
) -> AsyncIterator[MemorySystem]:
    """Every step takes STEP_S, whatever is in it, and messages take no time but what `network` says."""
    cost = StepCost(STEP_S, per_prefill_token_s=0.0, per_decode_sequence_s=0.0)
    async with MemorySystem(
        num_prefill,
        num_decode,
        num_blocks=200,
        network=network,
        router_settings=router_settings,
        cost=cost,
    ) as system:
        yield system


def test_tokens_blocks_and_times_of_a_split_request() -> None:
    async def story() -> None:
        async with steady_system() as system:
            await system.generate(prompt_of(33), greedy(9))
            await system.at_rest()
            prefill = {
                "prompt_tokens_total": 33,
                "generated_tokens_total": 1,
                "prefix_query_tokens_total": 33,
            }
            decode = {"prompt_tokens_total": 0, "generated_tokens_total": 8, "prefix_query_tokens_total": 33}
            assert {name: system.metric("prefill-0", name) for name in prefill} == prefill
            assert {name: system.metric("decode-0", name) for name in decode} == decode
            assert system.metric("prefill-0", "prefill_calls_total", outcome="sealed") == 1
            assert system.metric("decode-0", "worker_requests_total", outcome="length") == 1
            assert system.router_metric("router_requests_total", outcome="length") == 1
            assert system.router_metric("router_prompt_tokens_total") == 33
            assert system.router_metric("router_output_tokens_total") == 9
            # 5 chunks until the first token; then a step for each of the 8 others
            assert system.router_metric("time_to_first_token_seconds_count") == 1
            assert system.router_metric("time_to_first_token_seconds_sum") == pytest.approx(5 * STEP_S)
            assert system.router_metric("time_to_second_token_seconds_count") == 1
            assert system.router_metric("time_to_second_token_seconds_sum") == pytest.approx(6 * STEP_S)
            assert system.router_metric("inter_token_seconds_count") == 8
            assert system.router_metric("inter_token_seconds_sum") == pytest.approx(8 * STEP_S)

    run_virtual(story())


def test_transfers_and_prefix_hits() -> None:
    async def story() -> None:
        async with steady_system() as system:
            block_bytes = system.engines["decode-0"].info.block_bytes
            for num_blocks, num_hits in ((9, 0), (10, 32)):  # all 9 blocks, then only the last one again
                await system.generate(prompt_of(33), greedy(2))
                await system.at_rest()
                num_bytes = system.metric("decode-0", "kv_transfer_bytes_total", transport="grpc")
                assert num_bytes == num_blocks * block_bytes
                for worker in ("prefill-0", "decode-0"):
                    assert system.metric(worker, "prefix_hit_tokens_total") == num_hits
            assert system.metric("decode-0", "kv_transfers_total", transport="grpc", outcome="verified") == 2
            verified = {"transport": "grpc", "result": "verified"}
            num_segments = system.metric("decode-0", "kv_segments_total", **verified)
            assert num_segments == (4 + 2) + 2  # one per chunk, and of the last one per layer
            assert system.metric("decode-0", "kv_segment_seconds_count", transport="grpc") == num_segments

    run_virtual(story())


def test_an_unsplit_worker_counts_every_token_once() -> None:
    async def story() -> None:
        async with steady_system(num_prefill=0) as system:
            await system.generate(prompt_of(33), greedy(9))
            await system.at_rest()
            assert system.metric("decode-0", "prompt_tokens_total") == 33
            assert system.metric("decode-0", "generated_tokens_total") == 9

    run_virtual(story())


def test_a_decode_worker_that_computes_a_prompt_for_another_counts_what_it_samples() -> None:
    async def story() -> None:
        async with steady_system(num_prefill=0, num_decode=2) as system:
            source, taker = (worker.member() for worker in system.workers.values())
            system.router.set_members(Members(99, (replace(source, role=Role.PREFILL), taker)))
            await system.generate(prompt_of(33), greedy(9))
            await system.at_rest()
            names = "prompt_tokens_total", "generated_tokens_total"
            assert [system.metric("decode-0", name) for name in names] == [33, 1]
            assert [system.metric("decode-1", name) for name in names] == [0, 8]

    run_virtual(story())


def test_queues_and_batches_while_requests_wait_and_run() -> None:
    async def story() -> None:
        async with steady_system() as system:
            running = asyncio.create_task(system.generate(prompt_of(8), greedy(100)))
            await until(lambda: system.metric("decode-0", "active_sequences") == 1)
            computed = asyncio.create_task(system.generate(prompt_of(80, seed=2), greedy(2)))
            queued = asyncio.create_task(system.generate(prompt_of(40, seed=3), greedy(2)))
            calls = system.workers["prefill-0"].calls
            await until(lambda: any(job.num_computed == 5 * CHUNK for job in calls.in_state(JobState.READY)))
            assert system.metric("prefill-0", "active_sequences") == 1
            assert system.metric("prefill-0", "waiting_requests") == 1
            assert system.metric("prefill-0", "backlog_tokens") == 80 - 5 * CHUNK + 40
            assert system.metric("decode-0", "active_sequences") == 1
            assert system.metric("decode-0", "waiting_requests") == 2
            assert system.metric("decode-0", "backlog_tokens") == 0  # it computes no prompts itself
            assert system.metric("decode-0", "kv_blocks", state="reserved") == 80 // BLOCK
            assert system.router_metric("router_running_requests") == 3
            await asyncio.gather(running, computed, queued)
            await system.at_rest()
            for worker in ("prefill-0", "decode-0"):
                for gauge in ("active_sequences", "waiting_requests", "backlog_tokens"):
                    assert system.metric(worker, gauge) == 0

    run_virtual(story())


def test_requests_that_no_worker_can_take_yet_are_counted_as_waiting() -> None:
    async def story() -> None:
        async with steady_system() as system:
            away = system.workers.pop("decode-0")
            system.push_members()
            waiting = asyncio.create_task(system.generate(prompt_of(33), greedy(2)))
            await system.clock.sleep(1)
            assert system.router_metric("router_waiting_requests") == 1
            assert system.router_metric("router_waiting_tokens") == 33
            system.workers["decode-0"] = away
            system.push_members()
            await waiting
            assert system.router_metric("router_waiting_requests") == 0

    run_virtual(story())


def test_errors_are_counted_by_type() -> None:
    async def story() -> None:
        async with steady_system() as system:
            with pytest.raises(RequestTooLong):
                await system.generate(prompt_of(33), greedy(1000))
            assert system.router_metric("router_requests_total", outcome="request_too_long") == 1
            assert system.router_metric("router_attempts_total") == 0  # nothing has reached a worker

    run_virtual(story())


def test_a_client_that_reads_slowly_does_not_change_the_times_of_its_tokens() -> None:
    async def story() -> None:
        async with steady_system() as system:
            request = GenerateRequest(pack_tokens(prompt_of(8)), greedy(5), 1)
            async for _ in system.router.generate(system.router.new_request_id(), request):
                await system.clock.sleep(1)
            assert system.router_metric("inter_token_seconds_sum") == pytest.approx(4 * STEP_S)

    run_virtual(story())


def test_good_requests_are_counted_by_objective() -> None:
    """First tokens take a step for each chunk, later ones one each."""

    async def story() -> None:
        asked = RouterSettings(journey=JourneySettings(objectives=Objectives(ttft_s=0.2, tpot_s=0.1)))
        async with steady_system(router_settings=asked) as system:
            await system.generate(prompt_of(2 * CHUNK), greedy(3))
            await system.generate(prompt_of(5 * CHUNK, seed=2), greedy(3))
            with pytest.raises(RequestTooLong):
                await system.generate(prompt_of(33), greedy(1000))  # no service could have answered it
            assert system.router_metric("slo_requests_total", result="good") == 1
            assert system.router_metric("slo_requests_total", result="bad") == 1
            by_objective = {
                (objective, result): system.router_metric(
                    "slo_objectives_total", objective=objective, result=result
                )
                for objective in ("ttft", "tpot", "itl")
                for result in ("kept", "missed")
            }
            assert {key: count for key, count in by_objective.items() if count} == {
                ("ttft", "kept"): 1,
                ("ttft", "missed"): 1,
                ("tpot", "kept"): 2,
            }
            assert system.router_metric("slo_limit_seconds", objective="ttft") == 0.2
            assert system.router_metric("slo_target_ratio") == 0.99
            good = system.router.recent.good
            assert (good.num_good, good.num) == (1, 2)

    run_virtual(story())


def test_refused_requests_are_not_good() -> None:
    async def story() -> None:
        async with steady_system(router_settings=RouterSettings(AdmissionLimits(max_requests=1))) as system:
            served = asyncio.create_task(system.generate(prompt_of(8), greedy(3)))
            await until(lambda: system.router_metric("router_running_requests") == 1)
            with pytest.raises(Overloaded):
                await system.generate(prompt_of(8, seed=2), greedy(3))
            await served
            assert system.router_metric("slo_requests_total", result="good") == 1
            assert system.router_metric("slo_requests_total", result="bad") == 1
            assert system.router_metric("router_refusals_total", limit="max_requests") == 1

    run_virtual(story())


def test_a_request_that_a_bug_has_ended_is_bad_and_not_one_whose_client_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        async with steady_system() as system:
            monkeypatch.setattr(system.router.fleet, "view", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await system.generate(prompt_of(8), greedy(3))
            assert system.router_metric("router_requests_total", outcome="internal") == 1
            assert system.router_metric("slo_requests_total", result="bad") == 1

    run_virtual(story())


def test_where_the_time_of_a_request_went() -> None:
    async def story() -> None:
        async with steady_system() as system:
            await system.generate(prompt_of(5 * CHUNK), greedy(9))
            stages = {
                stage: system.router_metric("request_stage_seconds_sum", stage=stage)
                for stage in ("router_queue", "prefill_queue", "prefill", "first_token", "decode")
            }
            assert stages == pytest.approx(
                {
                    "router_queue": 0,
                    "prefill_queue": 0,
                    "prefill": 5 * STEP_S,
                    "first_token": 0,
                    "decode": 8 * STEP_S,
                },
                abs=STEP_S / 50,
            )
            count = "request_stage_seconds_count"
            for stage in (*stages, "transfer_hidden", "transfer_exposed"):
                assert system.router_metric(count, stage=stage) == 1
            assert system.router_metric(count, stage="prompt") == 0

    run_virtual(story())


def test_the_age_of_what_waits() -> None:
    async def story() -> None:
        async with steady_system() as system:
            running = asyncio.create_task(system.generate(prompt_of(40 * CHUNK), greedy(2)))
            await until(lambda: system.metric("prefill-0", "active_sequences") == 1)
            queued = asyncio.create_task(system.generate(prompt_of(40, seed=3), greedy(2)))
            await system.clock.sleep(1)
            assert system.metric("prefill-0", "oldest_waiting_seconds") == pytest.approx(1, abs=0.01)
            assert system.metric("decode-0", "oldest_waiting_seconds") == pytest.approx(1, abs=STEP_S)
            assert system.router_metric("router_oldest_waiting_seconds") == 0  # workers have them
            away = system.workers.pop("decode-0")
            await asyncio.gather(running, queued)
            system.push_members()
            waiting = asyncio.create_task(system.generate(prompt_of(33), greedy(2)))
            await system.clock.sleep(2)
            assert system.router_metric("router_oldest_waiting_seconds") == pytest.approx(2)
            system.workers["decode-0"] = away
            system.push_members()
            await waiting
            assert system.router_metric("router_oldest_waiting_seconds") == 0
            assert system.router_metric("request_stage_seconds_sum", stage="router_queue") >= 2
            for worker in ("prefill-0", "decode-0"):
                assert system.metric(worker, "oldest_waiting_seconds") == 0

    run_virtual(story())


def test_cached_and_recomputed_tokens() -> None:
    async def story() -> None:
        async with steady_system(num_decode=2) as system:
            await system.generate(prompt_of(33), greedy(1))
            assert system.router_metric("router_cached_tokens_total", pool="prefill") == 0
            again = asyncio.create_task(system.generate(prompt_of(33), greedy(30)))
            await until(lambda: system.router_metric("router_output_tokens_total") == 1 + 10)
            cached = {pool: system.router_metric("router_cached_tokens_total", pool=pool) for pool in POOLS}
            assert cached == {"prefill": 0, "decode": 0}  # it has not ended
            (serving,) = (name for name in system.workers if system.metric(name, "active_sequences"))
            await system.bury(system.kill(serving))
            await again
            # both attempts found the 8 full blocks of the prompt at the prefill worker, and the second one
            # computed the rest of it and the output that was there
            assert system.router_metric("router_cached_tokens_total", pool="prefill") == 32 + 32
            assert system.router_metric("router_recomputed_tokens_total", cause="worker_lost") == 1 + 10

    run_virtual(story())


def test_exemplars_name_the_request() -> None:
    async def story() -> None:
        async with steady_system() as system:
            await system.generate(prompt_of(33), greedy(9))
            page = generate_latest(system.router.registry).decode()
            named = {
                line.partition("{")[0]
                for line in page.splitlines()
                if f'# {{request_id="{system.router.identity.incarnation:016x}-1"}}' in line
            }
            histograms = (
                "time_to_first_token",
                "time_to_second_token",
                "inter_token",
                "request",
                "request_stage",
            )
            assert named == {f"pdserve_{name}_seconds_bucket" for name in histograms}

    run_virtual(story())
