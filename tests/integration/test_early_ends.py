"""Clients that leave, deadlines that pass and clients that do not read, over real sockets and real engines:
both workers stop, in whatever phase the request is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
import torch

from decode_worker.loop import DecodeLoop
from decode_worker.request import Phase
from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.engine.settings import EngineSettings
from pdserve.handoff.prefill_job import JobState
from router.api_settings import ApiLimits, ApiSettings
from router.http_api import create_app
from router.http_server import serve_http
from router.text import TextModel
from tests.held_steps import HeldSteps
from tests.local_system import LocalSystem
from tests.slow_client import narrow, slow_client
from tests.small_models import VOCAB_SIZE, SmallModel, make_model
from tests.small_tokenizers import byte_level_tokenizer

VICTIM = list(range(3, 103))
OTHER = list(range(5, 205))
MAX_TOKENS = 400
PHASES = ["queued", "prefilling", "decoding"]
APIS = ["http", "http stream", "grpc", "grpc stream"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path_factory.mktemp("llama"), seed=1)
    byte_level_tokenizer(VOCAB_SIZE).save(str(model.folder / "tokenizer.json"))
    return model


@pytest.fixture
async def system(model: SmallModel) -> AsyncIterator[LocalSystem]:
    settings = EngineSettings(
        str(model.folder),
        served_name="small",
        dtype="float32",
        threads=1,
        kv_memory_bytes=8 << 20,
        chunk_tokens=16,
    )
    async with LocalSystem(settings) as system:
        yield system
        await system.at_rest()


@pytest.fixture
def text_model(model: SmallModel) -> TextModel:
    return TextModel.load(model.folder)


# How a client asks: each awaits the end of the whole answer, and is left by being cancelled.


async def ask(api: str, system: LocalSystem, deadline_s: float | None = None) -> None:
    """Read the victim's answer to its end. Raises what the API says of a deadline."""
    if api.startswith("http"):
        await ask_http(system, "stream" in api, deadline_s)
    else:
        await ask_grpc(system, "stream" in api, deadline_s)


async def ask_http(system: LocalSystem, stream: bool, deadline_s: float | None) -> None:
    body = {"prompt": VICTIM, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
    headers = {} if deadline_s is None else {"X-Request-Timeout-Ms": f"{deadline_s * 1000:.0f}"}
    async with httpx.AsyncClient(base_url=system.url, timeout=60) as client:
        answer = await client.post("/v1/completions", json=body, headers=headers)
    if "deadline_exceeded" in answer.text:
        raise TimeoutError(f"{answer.status_code}: {answer.text}")


async def ask_grpc(system: LocalSystem, stream: bool, deadline_s: float | None) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=VICTIM), max_tokens=MAX_TOKENS, sampling=pb.Sampling(ignore_eos=True)
    )
    async with grpc.aio.insecure_channel(system.grpc_address) as channel:
        stub: Any = pb_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        try:
            if stream:
                async for _ in stub.GenerateStream(request, timeout=deadline_s):
                    pass
            else:
                await stub.Generate(request, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise TimeoutError(error.details()) from None


@dataclass
class Scene:
    """A system in which the victim has reached a phase and stays there."""

    system: LocalSystem
    asking: "asyncio.Task[None]"
    phase: str

    async def assert_it_ended_everywhere(self, *outcomes: str) -> None:
        """At the decode worker with one of `outcomes`, and at the prefill worker: even before the step under
        way has ended."""
        await until(lambda: ended_at_decode(self.system, *outcomes) == 1)
        at_prefill = "sealed" if self.phase == "decoding" else "cancelled"
        await until(lambda: self.system.metric("prefill-0", "prefill_calls_total", outcome=at_prefill) == 1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # counters tell nobody
            await asyncio.sleep(0.005)


@asynccontextmanager
async def scene_at(
    phase: str, system: LocalSystem, start: Callable[[], Awaitable[None]]
) -> AsyncIterator[Scene]:
    """`start` asks for the victim. When the story is over the engines run on, and nothing must be left."""
    decoding = phase == "decoding"
    held = HeldSteps(system.workers["decode-0" if decoding else "prefill-0"], num_free=3 if decoding else 1)
    others = []
    if phase == "queued":
        others.append(asyncio.create_task(complete_other(system)))
        await held.standing()
    asking = asyncio.create_task(start())
    if phase == "queued":
        await until(lambda: bool(system.workers["prefill-0"].calls.in_state(JobState.QUEUED)))
    else:
        await held.standing()
    assert_in_phase(system, phase)
    try:
        yield Scene(system, asking, phase)
    finally:
        held.release()
    await asyncio.gather(*others)
    await system.at_rest()
    assert_little_was_done(system, phase)


async def complete_other(system: LocalSystem) -> None:
    body = {"prompt": OTHER, "max_tokens": 1}
    async with httpx.AsyncClient(base_url=system.url, timeout=60) as client:
        (await client.post("/v1/completions", json=body)).raise_for_status()


def assert_in_phase(system: LocalSystem, phase: str) -> None:
    loop = system.workers["decode-0"].loop
    assert isinstance(loop, DecodeLoop)
    at = {"queued": Phase.WAITING, "prefilling": Phase.RECEIVING, "decoding": Phase.DECODING}[phase]
    assert [request.num_prompt for request in loop.in_phase(at)] == [len(VICTIM)]


def assert_little_was_done(system: LocalSystem, phase: str) -> None:
    """The step that was held has been taken, and no other: of 100 tokens and 400."""
    num_prefilled = system.metric("prefill-0", "prompt_tokens_total")
    assert num_prefilled == {"queued": len(OTHER), "prefilling": 32, "decoding": len(VICTIM)}[phase]
    assert system.metric("decode-0", "generated_tokens_total") <= 4


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("api", APIS)
async def test_a_client_that_leaves(system: LocalSystem, api: str, phase: str) -> None:
    async with scene_at(phase, system, lambda: ask(api, system)) as scene:
        scene.asking.cancel()
        await asyncio.gather(scene.asking, return_exceptions=True)
        await scene.assert_it_ended_everywhere("cancelled")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("api", APIS)
async def test_a_deadline_that_passes(system: LocalSystem, api: str, phase: str) -> None:
    async with scene_at(phase, system, lambda: ask(api, system, deadline_s=1.0)) as scene:
        with pytest.raises(TimeoutError, match=r"(?i)deadline"):
            await scene.asking
        await scene.assert_it_ended_everywhere("cancelled", "deadline_exceeded")


# Clients that stay and do not read


@asynccontextmanager
async def narrow_api(system: LocalSystem, text_model: TextModel, max_unread: int) -> AsyncIterator[str]:
    """The URL of a second HTTP API of the system, whose connections take little."""
    settings = ApiSettings(limits=ApiLimits(max_unread_tokens=max_unread))
    app = create_app(system.router, text_model, settings, observer=system.router.metrics)
    server = await serve_http(app, "127.0.0.1", 0)
    narrow(server)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.stop(grace_s=5)


BODY = {
    "prompt": VICTIM,
    "max_tokens": MAX_TOKENS,
    "ignore_eos": True,
    "stream": True,
    "logprobs": 20,
    "n": 4,
}
"""Half a kilobyte of answer for each of four times 400 tokens; a narrow connection takes a tenth of it."""


async def test_a_client_that_does_not_read_is_cut(system: LocalSystem, text_model: TextModel) -> None:
    async with narrow_api(system, text_model, max_unread=64) as url:
        async with slow_client(url, "/v1/completions", BODY) as client:
            await client.read_until(b"data: ")
            await until(lambda: ended_at_decode(system, "client_too_slow") == 4)
            await system.at_rest()
    assert system.metric("decode-0", "generated_tokens_total") < 4 * MAX_TOKENS / 2
    assert answered(system, code="client_too_slow", status="408") == 1


async def test_a_client_that_does_not_read_cannot_outlive_its_deadline(
    system: LocalSystem, text_model: TextModel
) -> None:
    held = HeldSteps(system.workers["decode-0"], num_free=150)
    async with narrow_api(system, text_model, max_unread=MAX_TOKENS) as url:
        headers = {"X_Request_Timeout_Ms": "3000"}
        async with slow_client(url, "/v1/completions", BODY, **headers):
            await held.standing()
            assert ended_at_decode(system, "cancelled", "deadline_exceeded") == 0
            await until(lambda: ended_at_decode(system, "cancelled", "deadline_exceeded") == 4)
            held.release()
            await system.at_rest()
    assert answered(system, code="deadline_exceeded", status="504") == 1


def ended_at_decode(system: LocalSystem, *outcomes: str) -> float:
    return sum(system.metric("decode-0", "worker_requests_total", outcome=outcome) for outcome in outcomes)


def answered(system: LocalSystem, **labels: str) -> float:
    registry = system.router.registry
    return registry.get_sample_value("pdserve_api_responses_total", {"api": "completions", **labels}) or 0.0
