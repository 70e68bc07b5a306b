"""The gRPC API over a real socket: answers, statuses, cancellation, health and reflection."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.clock import LoopClock, SeededRng
from pdserve.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    RequestTooLong,
    Unavailable,
    WorkerLost,
)
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from router.api_settings import ApiLimits, ApiSettings
from router.grpc_api import SERVICE, serve_grpc
from router.requests import OutputDelta, Readiness
from router.text import TextModel
from tests.fake_desk import MODEL_INFO, FakeDesk, Hold, Step, endless, say
from tests.small_tokenizers import save_chat_folder

END = 1  # <|end|>
Status = grpc.StatusCode


class TickingClock(LoopClock):
    """A clock whose sleepers wake when the test says so."""

    def __init__(self) -> None:
        self.asleep = asyncio.Event()
        self._wake = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asleep.set()
        await self._wake.wait()
        self._wake.clear()

    def tick(self) -> None:
        self._wake.set()


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str, int]] = []
        self.timed: list[tuple[str, str]] = []
        self.end = asyncio.Event()

    def on_request_start(self, api: str) -> None:
        self.end.clear()

    def on_tokenised(self, api: str, seconds: float) -> None:
        self.timed.append(("tokenised", api))

    def on_first_event(self, api: str, seconds: float) -> None:
        self.timed.append(("first event", api))

    def on_request_end(self, api: str, code: str, status: int) -> None:
        self.ended.append((api, code, status))
        self.end.set()


class System:
    """One running gRPC front with its client."""

    def __init__(self, desk: FakeDesk, text: TextModel, address: str, seen: Seen, clock: TickingClock):
        self.desk = desk
        self.text = text
        self.address = address
        self.seen = seen
        self.clock = clock
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = pb_grpc.GenerationStub(self.channel)  # type: ignore[no-untyped-call]

    def ids(self, text: str) -> list[int]:
        return unpack_tokens(self.text.encode(text))

    async def ended(self) -> list[tuple[str, str, int]]:
        await self.seen.end.wait()
        return self.seen.ended

    async def fail(self, **fields: Any) -> grpc.aio.AioRpcError:
        """The error with which both methods end."""
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await self.stub.Generate(pb.GenerateRequest(**fields))
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            await self.stub.GenerateStream(pb.GenerateRequest(**fields)).read()
        assert (unary.value.code(), unary.value.details()) == (
            streamed.value.code(),
            streamed.value.details(),
        )
        return unary.value


def running(
    text: TextModel, desk: FakeDesk | None = None, **limits: int
) -> AbstractAsyncContextManager[System]:
    return _running(text, desk or FakeDesk(), ApiLimits(**limits))


@asynccontextmanager
async def _running(text: TextModel, desk: FakeDesk, limits: ApiLimits) -> AsyncIterator[System]:
    seen, clock = Seen(), TickingClock()
    settings = ApiSettings(served_model_name="chosen", limits=limits)
    server = await serve_grpc(
        desk, text, "127.0.0.1", 0, settings, observer=seen, rng=SeededRng(7), clock=clock
    )
    system = System(desk, text, f"127.0.0.1:{server.port}", seen, clock)
    try:
        yield system
    finally:
        await system.channel.close(None)
        await server.stop(grace_s=1)
    assert not desk.running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(save_chat_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
async def system(text: TextModel) -> AsyncIterator[System]:
    async with running(text) as started:
        yield started


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def read_all(system: System, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in system.stub.GenerateStream(request)]


async def test_generate(system: System) -> None:
    ids = [*system.ids(" hello 😀"), END]
    system.desk.script = lambda request: say(ids)
    answer = await system.stub.Generate(pb.GenerateRequest(model="chosen", text="the fox"))
    assert (answer.id, answer.model) == ("fake-1", "chosen")
    assert [choice.text for choice in answer.choices] == [" hello 😀"]
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(system.ids("the fox")),
        len(ids),
    )
    assert system.seen.timed == [("tokenised", "grpc")]
    assert answer.usage.cached_tokens == 3
    assert not answer.prompt_token_ids
    assert not answer.choices[0].token_ids
    assert await system.ended() == [("grpc", "ok", 200)]


async def test_generate_stream_says_the_same(system: System) -> None:
    ids = [*system.ids(" hello 😀"), END]
    system.desk.script = lambda request: say(ids)
    chunks = await read_all(system, pb.GenerateRequest(text="the fox"))
    assert system.seen.timed == [("tokenised", "grpc"), ("first event", "grpc")]
    assert "".join(chunk.choice.text for chunk in chunks) == " hello 😀"
    assert [chunk.choice.finish_reason for chunk in chunks[-2:]] == [pb.FINISH_REASON_STOP, 0]
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert all(chunk.choice.text for chunk in chunks[:-2])  # held text makes no chunk


async def test_a_chat(system: System) -> None:
    chat = pb.Chat(
        messages=[pb.Message(role="system", content="be kind"), pb.Message(role="user", content="hi")]
    )
    await system.stub.Generate(pb.GenerateRequest(chat=chat))
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    request = system.desk.requests[0]
    assert request.prompt_tokens == system.text.encode_chat(messages)
    assert request.sampling.max_tokens == 128 - len(request.prompt_tokens) // 4
    assert request.deadline_s is None


async def test_every_field_reaches_the_desk(system: System) -> None:
    sampling = pb.Sampling(
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={7: -100.0},
        seed=99,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        min_tokens=1,
    )
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[10, 11]), n=2, max_tokens=4, sampling=sampling, priority=-2
    )
    await system.stub.Generate(request, timeout=60)
    first, second = system.desk.requests
    params = first.sampling
    assert unpack_tokens(first.prompt_tokens) == [10, 11]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.5, 3, 0.25)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (params.logit_bias, params.stop_token_ids) == (((7, -100.0),), (5, 6))
    assert (params.ignore_eos, params.min_tokens, params.max_tokens) == (True, 1, 4)
    assert (first.seed, first.priority) == (99, -2)
    assert second.seed not in (None, 99)
    assert first.deadline_s is not None
    assert 0 < first.deadline_s < 61  # gRPC rounds up


async def test_ids_logprobs_echo_and_n(system: System) -> None:
    request = pb.GenerateRequest(text="fox", n=2, max_tokens=3, return_token_ids=True, echo=True)
    ids = system.ids("fox")
    expected = [ids[i % len(ids)] for i in range(3)]
    answer = await system.stub.Generate(request)
    chunks = await read_all(system, request)
    assert list(answer.prompt_token_ids) == list(chunks[0].prompt_token_ids) == ids
    assert not any(chunk.prompt_token_ids for chunk in chunks[1:])
    for index in (0, 1):
        parts = [chunk.choice for chunk in chunks if chunk.HasField("choice") and chunk.choice.index == index]
        assert list(answer.choices[index].token_ids) == expected
        assert [token for part in parts for token in part.token_ids] == expected
        text = "fox" + system.text.decode_ids(expected)
        assert answer.choices[index].text == "".join(part.text for part in parts) == text


@pytest.mark.parametrize("chat", [False, True])
async def test_logprobs(system: System, chat: bool) -> None:
    ids = [*system.ids("😀!"), END]
    system.desk.script = lambda request: say(ids)
    request = pb.GenerateRequest(text="x", logprobs=2)
    if chat:
        request.chat.messages.append(pb.Message(role="user", content="x"))
    answer = await system.stub.Generate(request)
    entries = answer.choices[0].logprobs
    assert [entry.token_id for entry in entries] == ids
    assert b"".join(entry.token for entry in entries) == "😀!<|end|>".encode()
    assert [entry.logprob for entry in entries] == [-token / 1000 for token in ids]
    assert [entry.text_offset for entry in entries] == [0, 0, 0, 0, 1, 2]
    assert [top.token_id for top in entries[0].top] == [300, 301]


async def test_a_stop_string_ends_text_and_work(system: System) -> None:
    system.desk.script = lambda request: [*say(system.ids("hello world and more")), Hold()]
    answer = await system.stub.Generate(pb.GenerateRequest(text="x", stop=["lo w"]))
    assert answer.choices[0].text == "hel"
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert system.desk.closed == ["fake-1"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "'prompt' is required"),
        ({"text": ""}, "prompt", "at least one token"),
        ({"token_ids": pb.TokenIds(ids=[400])}, "prompt", "token id 400"),
        ({"token_ids": pb.TokenIds()}, "prompt", "must be"),
        ({"chat": pb.Chat()}, "messages", "at least one message"),
        ({"chat": pb.Chat(messages=[pb.Message(role="robot")])}, "messages[0].role", "'assistant'"),
        ({"text": "a", "n": 0}, "n", "between 1 and 128"),
        ({"text": "a", "max_tokens": 0}, "max_tokens", "between 1"),
        ({"text": "a", "max_tokens": 200}, "max_tokens", "the model takes 128"),
        ({"text": "a", "logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"text": "a", "sampling": pb.Sampling(temperature=float("nan"))}, "temperature", "finite number"),
        ({"text": "a", "sampling": pb.Sampling(top_p=0)}, "top_p", "greater than 0"),
        ({"text": "a", "sampling": pb.Sampling(logit_bias={1: 1000})}, "logit_bias", "-100 and 100"),
        ({"text": "a", "stop": [""]}, "stop", "empty"),
        ({"chat": pb.Chat(messages=[pb.Message(role="user")]), "echo": True}, "echo", "unknown field"),
    ],
)
async def test_bad_requests_name_the_field(
    system: System, fields: dict[str, Any], param: str, message: str
) -> None:
    error = await system.fail(**fields)
    assert error.code() is Status.INVALID_ARGUMENT
    assert message in (error.details() or "")
    assert dict(error.trailing_metadata() or ())["error-param"] == param
    assert not system.desk.requests


async def test_what_no_pool_can_hold_is_refused_here(text: TextModel) -> None:
    desk = FakeDesk(info=replace(MODEL_INFO, num_blocks=4))  # of 16 tokens; the model takes 128
    async with running(text, desk) as system:
        error = await system.fail(token_ids=pb.TokenIds(ids=[5] * 40), max_tokens=25)
        assert error.code() is Status.INVALID_ARGUMENT
        assert "the largest KV pool holds 64 tokens" in (error.details() or "")
        assert dict(error.trailing_metadata() or ())["error-code"] == "request_too_long"
        assert not desk.requests


async def test_an_unknown_model(system: System) -> None:
    error = await system.fail(model="small-model", text="a")
    assert error.code() is Status.NOT_FOUND
    assert "'chosen'" in (error.details() or "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("the queue is full", retry_after_s=2.5), Status.RESOURCE_EXHAUSTED),
        (Unavailable("no decode worker"), Status.UNAVAILABLE),
        (WorkerLost("decode-0 died"), Status.UNAVAILABLE),
        (RequestTooLong("more than the pool holds"), Status.INVALID_ARGUMENT),
        (DeadlineExceeded("the deadline has passed"), Status.DEADLINE_EXCEEDED),
        (RuntimeError("a bug with secrets"), Status.INTERNAL),
    ],
)
async def test_errors_have_their_status(system: System, error: Exception, status: grpc.StatusCode) -> None:
    system.desk.script = lambda request: [error]
    answer = await system.fail(text="hello")
    assert answer.code() is status
    assert (answer.details() == str(error)) == (status is not Status.INTERNAL)
    metadata = dict(answer.trailing_metadata() or ())
    assert metadata.get("retry-after-s") == ("2.5" if isinstance(error, Overloaded) else None)


async def test_an_error_in_a_stream_follows_what_came_before(system: System) -> None:
    script = [OutputDelta(pack_tokens(system.ids("hello"))), WorkerLost("decode-0 died")]
    system.desk.script = lambda request: script
    call = system.stub.GenerateStream(pb.GenerateRequest(text="x"))
    assert (await call.read()).choice.text == "hello"
    with pytest.raises(grpc.aio.AioRpcError, match="decode-0 died"):
        await call.read()
    assert await system.ended() == [("grpc", "worker_lost", 503)]


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("how", ["cancel", "connection"])
@pytest.mark.parametrize("num_before", [0, 2])
async def test_a_call_that_ends_early_closes_its_requests(
    text: TextModel, method: str, how: str, num_before: int
) -> None:
    async with running(text) as system:
        holds = [Hold(), Hold()]
        waiting = iter(holds)
        before: list[Step] = [OutputDelta(pack_tokens([50]))] * num_before
        system.desk.script = lambda request: [*before, next(waiting)]
        call = getattr(system.stub, method)(pb.GenerateRequest(text="x", n=2))
        for hold in holds:
            await hold.reached.wait()
        if how == "cancel":
            call.cancel()
        else:
            await system.channel.close(None)
        await system.desk.at_rest.wait()
        assert len(system.desk.closed) == 2
        assert (await system.ended())[0][1] == "cancelled"


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_deadline_ends_the_call_and_its_request(system: System, method: str) -> None:
    hold = Hold()
    system.desk.script = lambda request: [hold]
    call = getattr(system.stub, method)(pb.GenerateRequest(text="x"), timeout=2)
    assert await call.code() is Status.DEADLINE_EXCEEDED
    await system.desk.at_rest.wait()
    assert system.desk.closed == ["fake-1"]


async def test_a_client_that_stops_reading_is_cut(text: TextModel) -> None:
    desk = FakeDesk(endless)
    async with running(text, desk, max_unread_tokens=64) as system:
        request = pb.GenerateRequest(text="x", return_token_ids=True, logprobs=20)
        call = system.stub.GenerateStream(request)
        await call.read()
        assert await system.ended() == [("grpc", "client_too_slow", 408)]
        assert desk.closed == ["fake-1"]
        with pytest.raises(grpc.aio.AioRpcError, match="has not read"):
            await read_to_the_end(call)
        assert await call.code() is Status.ABORTED


async def test_a_client_that_does_not_even_read_the_first_chunk_is_cut(text: TextModel) -> None:
    desk = FakeDesk(endless, info=replace(MODEL_INFO, max_model_len=2**20, num_blocks=2**16))
    async with running(text, desk, max_unread_tokens=64) as system:
        call = system.stub.GenerateStream(
            pb.GenerateRequest(text="hello " * 100_000, echo=True, max_tokens=9)
        )
        assert await system.ended() == [("grpc", "client_too_slow", 408)]
        assert desk.closed == ["fake-1"]
        with pytest.raises(grpc.aio.AioRpcError):
            await read_to_the_end(call)


async def test_before_any_worker_is_there(text: TextModel) -> None:
    desk = FakeDesk(info=None, ready=Readiness(False, "no worker yet"))
    async with running(text, desk) as system:
        error = await system.fail(text="hello")
        assert error.code() is Status.UNAVAILABLE
        assert "no worker yet" in (error.details() or "")


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_readiness(system: System, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(system.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    watch = stub.Watch(request)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await stub.Check(request)).status == serving
    assert (await watch.read()).status == serving
    system.desk.ready = Readiness(False, "loading")
    assert (await stub.Check(request)).status == not_serving
    await system.clock.asleep.wait()
    system.clock.tick()
    assert (await watch.read()).status == not_serving
    watch.cancel()


async def test_health_of_an_unknown_service(system: System) -> None:
    stub = health_pb2_grpc.HealthStub(system.channel)
    request = health_pb2.HealthCheckRequest(service="other")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(request)
    assert caught.value.code() is Status.NOT_FOUND
    watch = stub.Watch(request)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_reflection_describes_the_service(system: System) -> None:
    def ask() -> tuple[set[str], set[str]]:
        with grpc.insecure_channel(system.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName(SERVICE)
            return set(database.get_services()), {method.name for method in service.methods}

    services, methods = await asyncio.to_thread(ask)
    assert {SERVICE, "grpc.health.v1.Health"} <= services
    assert SERVICE == "pdserve.api.v1.Generation"
    assert methods == {"Generate", "GenerateStream"}


async def test_stopping_ends_open_calls(text: TextModel) -> None:
    desk, hold, seen = FakeDesk(), Hold(), Seen()
    desk.script = lambda request: [hold]
    server = await serve_grpc(desk, text, "127.0.0.1", 0, observer=seen)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = pb_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        call = stub.GenerateStream(pb.GenerateRequest(text="x"))
        await hold.reached.wait()
        await server.stop(grace_s=0)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await desk.at_rest.wait()
    assert desk.closed == ["fake-1"]


async def test_a_port_in_use_is_named(text: TextModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--grpc-port"):
            await serve_grpc(FakeDesk(), text, "127.0.0.1", port)


async def test_length_is_the_other_reason_to_finish(system: System) -> None:
    system.desk.script = lambda request: say([5], finish=FinishReason.LENGTH)
    answer = await system.stub.Generate(pb.GenerateRequest(text="x", max_tokens=1))
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
