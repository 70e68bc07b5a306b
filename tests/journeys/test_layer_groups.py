"""The last chunk of a prompt leaves by groups of layers, and what half of it is worth when all goes wrong."""

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

from pdserve.contract.ids import Incarnation, RequestId, RouterId, SubmitNumber
from pdserve.contract.messages import Frame, Message, PrefillSource, Segment, SessionOpen, Submit
from pdserve.contract.ports import Call
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.contract.work import StepBatch, StepResult
from pdserve.engine.executor import Stage
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from router.requests import GenerateRequest
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.journeys.test_metrics import BLOCK, CHUNK, steady_system
from tests.memory_system import MemorySystem, greedy

NUM_WHOLE_CHUNKS = 4
PROMPT = prompt_of(NUM_WHOLE_CHUNKS * CHUNK + BLOCK + 1)  # the last chunk fills one block and begins another


def num_verified(system: MemorySystem) -> float:
    return system.metric("decode-0", "kv_segments_total", transport="grpc", result="verified")


def test_layers_arrive_before_their_step_has_ended() -> None:
    async def story() -> None:
        async with steady_system() as system:
            task = asyncio.create_task(system.generate(PROMPT, greedy(5)))
            await until(lambda: num_verified(system) == NUM_WHOLE_CHUNKS + 1)
            prefill, decode = system.workers["prefill-0"], system.workers["decode-0"]
            assert prefill.loop.num_steps == NUM_WHOLE_CHUNKS  # the last one still runs
            await until(lambda: num_verified(system) == NUM_WHOLE_CHUNKS + 2)
            assert prefill.loop.num_steps == NUM_WHOLE_CHUNKS  # it samples
            assert decode.loop.running_sequences == 0  # not before it is sealed
            assert await task == system.expected(PROMPT, greedy(5))
            await system.at_rest()

    run_virtual(story())


def test_a_decode_worker_is_a_source_like_any_other() -> None:
    async def story() -> None:
        async with steady_system(num_prefill=0, num_decode=2) as system:
            source, target = system.workers["decode-1"], system.workers["decode-0"]
            session = await MemoryRpc(system.network, "router-1").open(target.address, Call.SESSION)
            await session.send(SessionOpen(RouterId("router-1"), Incarnation(1), target.incarnation))
            prefill = PrefillSource(source.worker_id, source.address, source.incarnation)
            number, sampling = SubmitNumber(1), greedy(5)
            prompt = pack_tokens(PROMPT)
            await session.send(Submit(number, RequestId("r"), 1, prompt, b"", sampling, 7, prefill))
            await until(lambda: num_verified(system) == NUM_WHOLE_CHUNKS + 1)
            assert source.loop.num_steps == NUM_WHOLE_CHUNKS  # the last one still runs
            output: list[int] = []
            while len(output) < 5:
                message = await session.receive()
                if isinstance(message, Frame):
                    output += [token for event in message.events for token in unpack_tokens(event.tokens)]
            assert output == system.expected(PROMPT, sampling)
            session.cancel()
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_only_what_comes_after_the_last_pass_is_exposed(latency_s: float) -> None:
    """A segment takes one latency to be announced; its bytes take the same time beside that. So of a step of
    50 ms whose two layers are done after a third and two thirds, both are there in time."""

    async def story() -> None:
        async with steady_system(network=MemoryNetwork(lambda *_: latency_s)) as system:
            request = GenerateRequest(pack_tokens(PROMPT), greedy(5), seed=7)
            deltas = [delta async for delta in system.router.generate(RequestId("r"), request)]
            timings = deltas[-1].timings
            assert timings is not None
            # Sealed itself takes a latency, and after that nothing is left to do.
            assert timings.transfer_exposed_s == pytest.approx(0.0)
            labels = {"transport": "grpc"}
            assert system.metric("decode-0", "kv_transfer_ahead_ratio_count", **labels) == 1
            assert system.metric("decode-0", "kv_transfer_ahead_ratio_sum", **labels) == 1
            exposed_s = system.metric("decode-0", "kv_transfer_exposed_seconds_sum", **labels)
            assert exposed_s == pytest.approx(timings.transfer_exposed_s)
            hidden_s = system.metric("decode-0", "kv_transfer_hidden_seconds_sum", **labels)
            assert hidden_s == pytest.approx(timings.transfer_hidden_s)
            assert timings.transfer_hidden_s == pytest.approx(timings.transfer_s)
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_half_a_block_is_not_believed(end: str) -> None:
    """The source ends when one group of layers of the last chunk has arrived: the decode worker goes on with
    the whole chunks before it, from another source."""

    async def story() -> None:
        async with steady_system(num_prefill=2) as system:
            if end == "failed":
                fail_after_first_layers_of_the_end(system)
            task = asyncio.create_task(system.generate(PROMPT, greedy(5)))
            await until(lambda: num_verified(system) == NUM_WHOLE_CHUNKS + 1)
            (source,) = (name for name in system.workers if system.metric(name, "prompt_tokens_total"))
            if end == "killed":
                lost = system.kill(source)
            else:
                lost = system.workers.pop(source)
                with pytest.raises(RuntimeError, match="CUDA error"):
                    await lost.ended()
            assert await task == system.expected(PROMPT, greedy(5))
            assert system.metric("decode-0", "prefix_hit_tokens_total") == NUM_WHOLE_CHUNKS * CHUNK
            await system.at_rest()
            await lost.stop()
            assert lost.ledger.owners() == []

    run_virtual(story())


def fail_after_first_layers_of_the_end(system: MemorySystem) -> None:
    """The first step that tells of its layers fails behind the first group; all others succeed."""
    has_failed = False

    def stages_of(engine: Any) -> Any:
        whole = engine.stages

        def stages(batch: StepBatch) -> Generator[Stage, None, StepResult]:
            nonlocal has_failed
            running = whole(batch)
            yield next(running)
            if not has_failed:
                has_failed = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return (yield from running)

        return stages

    for name, engine in system.engines.items():
        if name.startswith("prefill"):
            engine.stages = stages_of(engine)  # type: ignore[method-assign]


def test_a_repeated_announcement_is_acknowledged_and_copies_nothing() -> None:
    async def story() -> None:
        async with steady_system() as system:
            repeat_segments(system.workers["decode-0"].loop._arrivals._rpc)
            assert await system.generate(PROMPT, greedy(5)) == system.expected(PROMPT, greedy(5))
            await system.at_rest()
            repeated = {"transport": "grpc", "result": "repeated"}
            assert num_verified(system) == NUM_WHOLE_CHUNKS + 2
            assert system.metric("decode-0", "kv_segments_total", **repeated) == NUM_WHOLE_CHUNKS + 2
            num_blocks = len(PROMPT) // BLOCK + 1
            num_bytes = num_blocks * system.engines["decode-0"].info.block_bytes
            assert system.metric("decode-0", "kv_transfer_bytes_total", transport="grpc") == num_bytes

    run_virtual(story())


def repeat_segments(rpc: Any) -> None:
    """Every Segment message reaches the worker of `rpc` twice."""
    whole_open = rpc.open

    async def open_repeating(address: str, call: Call) -> Any:
        stream = await whole_open(address, call)
        if call is Call.PREFILL:
            stream.receive = repeating(stream.receive)
        return stream

    def repeating(receive: Any) -> Any:
        again: list[Message] = []

        async def receive_again() -> Message:
            if again:
                return again.pop()
            message: Message = await receive()
            if isinstance(message, Segment):
                again.append(message)
            return message

        return receive_again

    rpc.open = open_repeating
