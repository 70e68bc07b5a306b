"""Traces of requests, as a collector gets them from routers and workers over OTLP."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import grpc.aio
import httpx
import pytest
import torch

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.clock import LoopClock
from pdserve.contract.tracing import Tracer
from pdserve.engine.settings import EngineSettings
from pdserve.tracing import OtlpTracer
from router.listen import bind
from tests.local_system import LocalSystem
from tests.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.ray_cluster import private_pdserve
from tests.small_models import SmallModel

TRACE_ID, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_SPAN}-01"
CHAT = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "max_tokens": 6, "temperature": 0}

AT_THE_ROUTER = {
    ("router-0 request", "router-0 chat"),
    ("router-0 router queue", "router-0 request"),
    ("router-0 attempt", "router-0 request"),
    ("decode-0 decode worker", "router-0 attempt"),
}
SPLIT = AT_THE_ROUTER | {
    ("router-0 chat", ""),
    ("decode-0 queue", "decode-0 decode worker"),
    ("decode-0 transfer", "decode-0 decode worker"),
    ("decode-0 decode", "decode-0 decode worker"),
    ("prefill-0 prefill worker", "decode-0 decode worker"),
    ("prefill-0 queue", "prefill-0 prefill worker"),
    ("prefill-0 prefill", "prefill-0 prefill worker"),
    ("prefill-0 ship", "prefill-0 prefill worker"),
}


@asynccontextmanager
async def traced_system(
    model: SmallModel, endpoint: str, num_prefill: int = 1, sample_ratio: float = 1.0
) -> AsyncIterator[LocalSystem]:
    """At its end every span has been sent."""

    def tracer_of(process: str) -> Tracer:
        names = {"service.name": process.partition("-")[0], "service.instance.id": process}
        return OtlpTracer(endpoint, sample_ratio, names, LoopClock())

    torch.set_num_threads(1)
    settings = EngineSettings(str(model.folder), dtype="float32", threads=1, kv_memory_bytes=4 << 20)
    async with LocalSystem(settings, num_prefill, tracer_of=tracer_of) as system:
        yield system
        await system.at_rest()


@pytest.fixture
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with otlp_receiver() as receiver:
        yield receiver


async def ask(system: LocalSystem, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        url = f"{system.url}/v1/chat/completions"
        return await client.post(url, json=CHAT | fields, headers=headers)


async def test_one_trace_from_the_client_through_router_decode_and_prefill(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    async with traced_system(chat_model, receiver.url) as system:
        answer = await ask(system, {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}, stream=True)
        (report,) = system.router.reports.recent(10)
    assert receiver.parents() == SPLIT
    assert {span.trace_id for span in receiver.spans} == {TRACE_ID}
    assert {span.trace_state for span in receiver.spans} == {"vendor=1"}
    top, request = receiver.the("router-0", "chat"), receiver.the("router-0", "request")
    assert top.parent_id == CLIENT_SPAN
    assert answer.headers["traceparent"] == f"00-{TRACE_ID}-{top.span_id}-01"
    assert request.attributes["pdserve.request_id"] == answer.headers["x-request-id"] == report.request_id
    assert request.attributes["gen_ai.usage.output_tokens"] == 6
    assert request.attributes["pdserve.outcome"] == "length"
    assert report.origin.trace is not None
    assert report.origin.trace.trace_id == TRACE_ID
    assert not [span for span in receiver.spans if span.has_failed]


async def test_spans_lie_within_those_above_and_stages_follow_each_other(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    async with traced_system(chat_model, receiver.url) as system:
        await ask(system)
        (report,) = system.router.reports.recent(10)
    worker = receiver.the("decode-0", "decode worker")
    stages = [receiver.the("decode-0", name) for name in ("queue", "transfer", "decode")]
    assert stages[0].start_ns == pytest.approx(worker.start_ns, abs=10**6)
    assert all(before.end_ns == after.start_ns for before, after in pairwise(stages))
    assert stages[-1].end_ns <= worker.end_ns
    call = receiver.the("prefill-0", "prefill worker")
    prefill = receiver.the("prefill-0", "prefill")
    assert worker.start_ns <= call.start_ns <= prefill.start_ns < prefill.end_ns <= call.end_ns
    # the same that the report tells, which went another way
    timings = report.timings
    assert timings is not None
    assert (prefill.end_ns - prefill.start_ns) / 1e9 == pytest.approx(timings.prefill_s, abs=1e-5)
    assert report.ended_s is not None
    request = receiver.the("router-0", "request")
    assert request.start_ns / 1e9 == pytest.approx(report.arrived_at, abs=1e-3)


async def test_an_unsplit_worker_tells_of_its_prefill_and_grpc_carries_the_context_too(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    async with traced_system(chat_model, receiver.url, num_prefill=0) as system:
        async with grpc.aio.insecure_channel(system.grpc_address) as channel:
            stub = pb_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]  # generated
            call = stub.Generate(
                pb.GenerateRequest(text="the sea", max_tokens=4),
                metadata=[("traceparent", TRACEPARENT)],
            )
            metadata = dict(await call.initial_metadata())
            await call
    assert {name for name, parent in receiver.parents() if parent == "decode-0 decode worker"} == {
        "decode-0 queue",
        "decode-0 prefill",
        "decode-0 decode",
    }
    top = receiver.the("router-0", "grpc")
    assert (top.trace_id, top.parent_id) == (TRACE_ID, CLIENT_SPAN)
    assert metadata["traceparent"] == f"00-{TRACE_ID}-{top.span_id}-01"


async def test_every_choice_has_a_span_and_a_refused_call_one_that_failed(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    async with traced_system(chat_model, receiver.url) as system:
        await ask(system, n=2)
        assert (await ask(system, max_tokens=-1)).status_code == 400
    served, refused = sorted(
        (span for span in receiver.spans if span.name == "chat"), key=lambda span: span.start_ns
    )
    below = [span for span in receiver.spans if span.parent_id == served.span_id]
    assert sorted(span.attributes["pdserve.choice"] for span in below) == [0, 1]
    assert (served.has_failed, refused.has_failed) == (False, True)
    assert refused.attributes["pdserve.outcome"] == "invalid_request"
    assert served.trace_id != refused.trace_id


@pytest.mark.parametrize(
    ("traceparent", "sample_ratio"),
    [(f"00-{TRACE_ID}-{CLIENT_SPAN}-00", 1.0), ("nonsense", 0.0), ("0" * 1000, 0.0)],
)
async def test_what_the_client_or_the_operator_does_not_want_traced_is_not(
    receiver: OtlpReceiver, chat_model: SmallModel, traceparent: str, sample_ratio: float
) -> None:
    async with traced_system(chat_model, receiver.url, sample_ratio=sample_ratio) as system:
        answer = await ask(system, {"traceparent": traceparent})
    assert answer.status_code == 200
    assert receiver.spans == []
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[02]", answer.headers["traceparent"])


async def test_a_client_that_wants_a_trace_gets_it_whatever_the_ratio(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    async with traced_system(chat_model, receiver.url, sample_ratio=0.0) as system:
        await ask(system, {"traceparent": TRACEPARENT})
    assert receiver.parents() == SPLIT


async def test_a_collector_that_is_away_costs_no_request(chat_model: SmallModel) -> None:
    with bind("127.0.0.1", 0, "test") as listener:
        closed_port = listener.getsockname()[1]
    async with traced_system(chat_model, f"http://127.0.0.1:{closed_port}") as system:
        assert (await ask(system)).status_code == 200


async def test_without_a_tracer_nothing_is_sent_and_nothing_is_answered(chat_model: SmallModel) -> None:
    torch.set_num_threads(1)
    settings = EngineSettings(str(chat_model.folder), dtype="float32", threads=1, kv_memory_bytes=4 << 20)
    async with LocalSystem(settings) as system:
        answer = await ask(system, {"traceparent": TRACEPARENT})
        assert "traceparent" not in answer.headers


async def test_a_system_on_ray_sends_its_traces_where_it_is_told(
    receiver: OtlpReceiver, chat_model: SmallModel
) -> None:
    options = ["--port", "0", "--threads", "1", "--set", "engine.kv_memory=16MiB"]
    options += ["--set", f"tracing.endpoint={receiver.url}", "--set", "name=traced"]

    def serve_one() -> None:
        with private_pdserve() as alone, alone.up("--model", str(chat_model.folder), *options) as up:
            url = f"{up.url}/v1/chat/completions"
            answer = httpx.post(
                url, json=CHAT, headers={"traceparent": TRACEPARENT}, timeout=30, trust_env=False
            )
            assert answer.status_code == 200

    await asyncio.to_thread(serve_one)
    assert receiver.parents() == SPLIT
    assert {span.service for span in receiver.spans} == {
        "pdserve-router",
        "pdserve-decode",
        "pdserve-prefill",
    }
