"""What the router's log and reports tell of requests, refused ones included, and what they never tell."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import torch

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.engine.settings import EngineSettings
from pdserve.logs import JsonFormatter
from router.admission import AdmissionLimits
from router.api_settings import ApiSettings
from router.router import RouterSettings
from tests.local_system import ADMIN_TOKEN, LocalSystem
from tests.small_models import SmallModel

SECRET = "sesame"
"""In no log line and in no report."""


@asynccontextmanager
async def running(model: SmallModel, **settings: Any) -> AsyncIterator[LocalSystem]:
    torch.set_num_threads(1)
    engine = EngineSettings(str(model.folder), dtype="float32", threads=1, kv_memory_bytes=4 << 20)
    async with LocalSystem(engine, **settings) as system:
        yield system
        await system.at_rest()


async def post(
    system: LocalSystem, body: Any, path: str = "chat/completions", **headers: str
) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        return await client.post(f"{system.url}/v1/{path}", content=content, headers=headers)


async def report_of(system: LocalSystem, request_id: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {ADMIN_TOKEN.secret}"}
    async with httpx.AsyncClient(trust_env=False, timeout=30, headers=headers) as client:
        answer = await client.get(f"{system.admin_url}/admin/requests/{request_id}")
    report: dict[str, Any] = answer.json()
    return report


def ends(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of all lines that tell of an end."""
    return [record.__dict__["fields"] for record in caplog.records if record.msg == "request ended"]


def chat(text: Any = "the sea", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


@pytest.mark.parametrize(
    ("body", "status", "outcome", "message"),
    [
        ("{", 400, "invalid_request", "the client was told what is wrong"),
        (
            chat(temperature=-1),
            400,
            "invalid_request",
            "the client was told what is wrong with 'temperature'",
        ),
        (chat(model="other"), 404, "not_found", "the client was told what is wrong with 'model'"),
        (chat("sea " * 2000), 400, "request_too_long", "tokens and leaves no room for an answer"),
    ],
)
async def test_a_refused_request_is_logged_reported_and_named(
    chat_model: SmallModel,
    lines: pytest.LogCaptureFixture,
    body: Any,
    status: int,
    outcome: str,
    message: str,
) -> None:
    async with running(chat_model) as system:
        answer = await post(system, body)
        request_id = answer.headers["x-request-id"]
        report = await report_of(system, request_id)
        renamed = await post(system, body, **{"x-request-id": "mine"})
    assert answer.status_code == status
    first, second = ends(lines)
    assert (first["request_id"], first["api"], first["outcome"]) == (request_id, "chat", outcome)
    assert message in first["error"]
    assert (report["state"], report["outcome"], report["prompt_tokens"]) == ("ended", outcome, None)
    assert (report["attempts"], report["stages"]) == ([], [])
    assert renamed.headers["x-request-id"] == second["client_request_id"] == "mine"


async def test_a_full_router_tells_of_those_that_it_turns_away(
    chat_model: SmallModel, lines: pytest.LogCaptureFixture
) -> None:
    full = RouterSettings(admission=AdmissionLimits(max_requests=1))
    async with running(chat_model, router_settings=full) as system:
        answer = await post(system, chat(n=2))
        assert answer.status_code == 429
        report = await report_of(system, answer.headers["x-request-id"])
    refused = [line for line in ends(lines) if line["outcome"] == "overloaded"]
    assert [line["attempts"] for line in refused] == [0]
    assert refused[0]["prompt_tokens"] > 0
    assert report["answer_id"] == refused[0]["answer_id"]


async def test_grpc_reads_and_answers_the_request_id(
    chat_model: SmallModel, lines: pytest.LogCaptureFixture
) -> None:
    good, bad = pb.GenerateRequest(text="the sea", max_tokens=2), pb.GenerateRequest(text="the sea", n=0)
    answered: list[str] = []
    async with running(chat_model) as system, grpc.aio.insecure_channel(system.grpc_address) as channel:
        stub = pb_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]  # generated
        for request in (good, bad):
            for metadata in ([("x-request-id", "mine")], []):
                for method in (stub.Generate, stub.GenerateStream):
                    call = method(request, metadata=metadata)
                    answered.append(str(dict(await call.initial_metadata())["x-request-id"]))
                    await read(call)
    told = ends(lines)
    assert len(told) == len(answered) == 8
    own = [answer for answer in answered if answer != "mine"]
    assert len(set(own)) == 4
    assert {line["request_id"] for line in told if "client_request_id" not in line} == set(own)
    assert [line["outcome"] for line in told] == ["length"] * 4 + ["invalid_request"] * 4


async def read(call: Any) -> None:
    """The whole answer, or the error."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call


# --- what users write ---

QUOTING = [
    chat(SECRET),
    chat([{"type": "text", "text": SECRET}]),
    chat({"text": SECRET}),
    chat([{"type": SECRET}]),
    {"messages": [{"role": SECRET, "content": "the sea"}]},
    {"messages": [{"role": "user", "content": "the sea", SECRET: 1}]},
    {"messages": SECRET},
    chat("the sea", **{SECRET: 1}),
    chat("the sea", temperature=SECRET),
    chat("the sea", logit_bias={SECRET: 1}),
    chat("the sea", stop=[SECRET * 1000]),
    chat("the sea", model=SECRET),
    chat((SECRET + " ") * 1000),
    f'{{"messages": "{SECRET}',
    SECRET,
]


async def test_no_line_and_no_report_quotes_a_request(
    chat_model: SmallModel, lines: pytest.LogCaptureFixture
) -> None:
    async with running(chat_model) as system:
        for body in QUOTING:
            for path in ("chat/completions", "completions"):
                answer = await post(system, body, path)
                report = await report_of(system, answer.headers["x-request-id"])
                assert SECRET not in json.dumps(report)
        assert (await post(system, {"prompt": SECRET, "max_tokens": 2}, "completions")).status_code == 200
        async with grpc.aio.insecure_channel(system.grpc_address) as channel:
            stub = pb_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]  # generated
            await stub.Generate(pb.GenerateRequest(text=SECRET, max_tokens=2))
    formatter = JsonFormatter("router-0")
    ours = [record for record in lines.records if not record.name.startswith(("httpcore", "httpx"))]
    assert len([record for record in ours if record.msg == "request ended"]) == 2 * len(QUOTING) + 2
    assert [line for line in map(formatter.format, ours) if SECRET in line] == []


async def test_prompts_are_logged_where_that_is_switched_on(
    chat_model: SmallModel, lines: pytest.LogCaptureFixture
) -> None:
    settings = ApiSettings(log_prompts=True)
    async with running(chat_model, api_settings=settings) as system:
        served = await post(system, chat(SECRET))
        await post(system, chat("the sea", temperature=SECRET))
    (prompt,) = [record.__dict__["fields"] for record in lines.records if record.msg == "prompt"]
    assert prompt["request_id"] == served.headers["x-request-id"]
    assert SECRET in prompt["prompt"]
    assert SECRET in ends(lines)[1]["error"]
