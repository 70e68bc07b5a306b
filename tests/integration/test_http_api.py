"""The HTTP API over a real socket, asked by the official client and by plain httpx."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

import pdserve
from pdserve.clock import SeededRng
from pdserve.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    RequestTooLong,
    Unavailable,
    WorkerLost,
)
from pdserve.contract.ids import RequestId
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from router.api_settings import ApiLimits, ApiSettings
from router.http_api import create_app
from router.http_server import IDLE_TIMEOUT_S, serve_http
from router.report_json import timings_json
from router.request_reports import Origin, RequestReport
from router.requests import OutputDelta, Readiness
from router.text import TextModel
from tests.fake_desk import MODEL_INFO, FakeDesk, Hold, Step, endless, say
from tests.slow_client import narrow, slow_client
from tests.small_tokenizers import save_chat_folder

END = 1  # <|end|>
USER: Any = [{"role": "user", "content": "hello"}]


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[tuple[str, str, int]] = []
        self.timed: list[tuple[str, str]] = []
        self.end = asyncio.Event()

    def on_request_start(self, api: str) -> None:
        self.started.append(api)

    def on_tokenised(self, api: str, seconds: float) -> None:
        self.timed.append(("tokenised", api))

    def on_first_event(self, api: str, seconds: float) -> None:
        self.timed.append(("first event", api))

    def on_request_end(self, api: str, code: str, status: int) -> None:
        self.ended.append((api, code, status))
        self.end.set()


class System:
    """One running front with its clients."""

    def __init__(self, desk: FakeDesk, text: TextModel, url: str, seen: Seen):
        self.desk = desk
        self.text = text
        self.url = url
        self.seen = seen
        self.http = httpx.AsyncClient(base_url=url, timeout=20, verify=False)
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, http_client=self.http
        )

    async def ended(self) -> list[tuple[str, str, int]]:
        """What the observer has heard, after at least one request has ended."""
        await self.seen.end.wait()
        return self.seen.ended

    def ids(self, text: str) -> list[int]:
        return unpack_tokens(self.text.encode(text))

    async def refuse(self, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """Post a body that is refused before the desk is asked; give back the error with its status."""
        response = await self.http.post(path, json=body)
        assert not self.desk.requests
        return {"status": response.status_code, **response.json()["error"]}


@asynccontextmanager
async def running(text: TextModel, desk: FakeDesk | None = None, **settings: Any) -> AsyncIterator[System]:
    desk = desk or FakeDesk()
    seen = Seen()
    app = create_app(desk, text, ApiSettings(**settings), observer=seen, rng=SeededRng(7))
    server = await serve_http(app, "127.0.0.1", 0)
    narrow(server)
    system = System(desk, text, f"http://127.0.0.1:{server.port}", seen)
    try:
        yield system
    finally:
        await system.client.close()
        await system.http.aclose()
        await server.stop(grace_s=1)
    assert not desk.running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(save_chat_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
async def system(text: TextModel) -> AsyncIterator[System]:
    async with running(text) as started:
        yield started


# Completions


async def test_a_completion(system: System) -> None:
    ids = [*system.ids(" hello 😀 world"), END]
    system.desk.script = lambda request: say(ids)
    answer = await system.client.completions.create(model="small-model", prompt="the fox", max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.model == "small-model"
    assert answer.choices[0].text == " hello 😀 world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(system.ids("the fox"))
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(ids)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.id.startswith("cmpl-fake-1")
    assert await system.ended() == [("completions", "ok", 200)]


async def test_a_streamed_completion_says_the_same(system: System) -> None:
    ids = [*system.ids(" hello 😀 world"), END]
    system.desk.script = lambda request: say(ids)
    stream = await system.client.completions.create(
        model="small-model", prompt="the fox", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " hello 😀 world"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert system.seen.timed == [("tokenised", "completions"), ("first event", "completions")]


async def test_without_include_usage_no_chunk_has_it(system: System) -> None:
    async with system.http.stream(
        "POST", "/v1/completions", json={"prompt": "hello", "stream": True, "max_tokens": 2}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all("usage" not in event and len(event["choices"]) == 1 for event in events)


async def test_usage_in_every_chunk_counts_up(system: System) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with system.http.stream(
        "POST",
        "/v1/completions",
        json={"prompt": "hello", "stream": True, "max_tokens": 4, "stream_options": options},
    ) as response:
        lines = [line async for line in response.aiter_lines() if line]
    usages = [json.loads(line.removeprefix("data: "))["usage"] for line in lines[:-1]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 4
    totals = [usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages]
    assert [usage["total_tokens"] for usage in usages] == totals


async def test_the_synchronous_client_works_too(system: System) -> None:
    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model="small-model", prompt="hello", max_tokens=4)
            parts = client.completions.create(model="small-model", prompt="hello", max_tokens=4, stream=True)
            return whole.choices[0].text, "".join(part.choices[0].text for part in parts)

    whole, streamed = await asyncio.to_thread(ask)
    ids = system.ids("hello")
    assert whole == streamed == system.text.decode_ids([ids[i % len(ids)] for i in range(4)])


@pytest.mark.parametrize("stream", [False, True])
async def test_all_prompts_and_all_n_are_answered(system: System, stream: bool) -> None:
    prompts = ["hello world", "the lazy dog"]
    body = {"prompt": prompts, "n": 3, "max_tokens": 4, "seed": 11, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
        texts, usage = await read_stream(system, body)
    else:
        answer = (await system.http.post("/v1/completions", json=body)).json()
        texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
        usage = answer["usage"]
    for index in range(6):
        ids = system.ids(prompts[index // 3])
        assert texts[index] == system.text.decode_ids([ids[i % len(ids)] for i in range(4)])
    assert usage["prompt_tokens"] == sum(len(system.ids(prompt)) for prompt in prompts)
    assert usage["completion_tokens"] == 24
    seeds = [request.seed for request in system.desk.requests]
    assert seeds[0] == seeds[3] == 11
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3


async def read_stream(system: System, body: dict[str, Any]) -> tuple[dict[int, str], dict[str, Any]]:
    texts: dict[int, str] = {}
    usage: dict[str, Any] = {}
    async with system.http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event["usage"] or usage
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts, usage


async def test_without_a_seed_all_choices_differ(system: System) -> None:
    await system.client.completions.create(model="small-model", prompt=["hello", "hello"], n=2)
    seeds = {request.seed for request in system.desk.requests}
    assert len(seeds) == 4
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("prompt", [[10, 20, 30], [[10, 20], [30]]])
async def test_prompts_of_token_ids_and_ids_in_the_answer(system: System, prompt: list[Any]) -> None:
    body = {"prompt": prompt, "max_tokens": 3, "return_token_ids": True}
    answer = (await system.http.post("/v1/completions", json=body)).json()
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    assert [unpack_tokens(request.prompt_tokens) for request in system.desk.requests] == prompts
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == [ids[i % len(ids)] for i in range(3)]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_ids_in_a_stream(system: System, path: str) -> None:
    ids = [*system.ids("😀"), END]
    system.desk.script = lambda request: say(ids)
    body = {"return_token_ids": True, "stream": True, "prompt": [10, 20]}
    if "chat" in path:
        body["messages"] = USER
        del body["prompt"]
    response = await system.http.post(path, json=body)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == ids
    first = events[0] if "chat" in path else choices[0]
    assert first["prompt_token_ids"] == unpack_tokens(system.desk.requests[0].prompt_tokens)
    assert (
        sum("prompt_token_ids" in (event if "chat" in path else event["choices"][0]) for event in events) == 1
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_delta", [1, 3])
async def test_a_stop_string_ends_text_and_work(system: System, stream: bool, per_delta: int) -> None:
    never = Hold()
    text_ids = system.ids("hello world and more")
    script: list[Step] = [*say(text_ids, per_delta=per_delta)[:-1], never]
    system.desk.script = lambda request: script
    body = {"prompt": "x", "stop": ["lo wor", "never"], "max_tokens": 40, "stream": stream}
    body["return_token_ids"] = True
    response = await system.http.post("/v1/completions", json=body)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "hel"
    assert choices[-1]["finish_reason"] == "stop"
    token_ids = [token for choice in choices for token in choice["token_ids"]]
    assert "lo wor" in system.text.decode_ids(token_ids)
    assert "lo wor" not in system.text.decode_ids(token_ids[:-1])
    assert system.desk.closed == ["fake-1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_timings_come_with_the_last_of_every_choice(system: System, path: str, stream: bool) -> None:
    report = RequestReport(
        request_id=RequestId("fake-1"),
        origin=Origin(),
        arrived_at=1_700_000_000.0,
        num_prompt_tokens=1,
        num_output_tokens=3,
        attempts=(),
        num_attempts=0,
        recoveries={},
        first_token_s=0.25,
        second_token_s=0.5,
        last_token_s=0.75,
        ended_s=0.75,
        outcome="length",
        message=None,
    )
    system.desk.reports[report.request_id] = report  # the second choice's is forgotten
    prompt = {"prompt": "the fox"} if path == "/v1/completions" else {"messages": USER}
    body = {**prompt, "n": 2, "max_tokens": 3, "timings": True, "stream": stream}
    answer = await system.http.post(path, json=body)
    answer.raise_for_status()
    events = [answer.json()] if not stream else []
    events += [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    told = {choice["index"]: choice["timings"] for choice in choices if choice["finish_reason"]}
    assert told == {0: timings_json(report), 1: None}
    assert not [choice for choice in choices if "timings" in choice and not choice["finish_reason"]]
    assert [request.origin.choice for request in system.desk.requests] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(system: System, stream: bool) -> None:
    ids = [*system.ids(" world"), END]
    system.desk.script = lambda request: say(ids)
    for prompt in ("hello 😀", system.ids("hello 😀")):
        body = {"prompt": prompt, "echo": True, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
            texts, _ = await read_stream(system, body)
            assert texts == {0: "hello 😀 world"}
        else:
            answer = (await system.http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == "hello 😀 world"


async def test_logprobs_of_a_completion(system: System) -> None:
    ids = [*system.ids("hello 😀!"), END]
    system.desk.script = lambda request: say(ids)
    whole = await system.client.completions.create(model="small-model", prompt="x", logprobs=2)
    stream = await system.client.completions.create(model="small-model", prompt="x", logprobs=2, stream=True)
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-token / 1000 for token in ids]
    assert logprobs.tokens is not None
    assert logprobs.tokens[-2:] == ["!", "<|end|>"]
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[-2:] == [len("hello 😀"), len("hello 😀!")]
    named = {system.text.decode_ids([token]): -token / 1000 for token in (300, 301)}
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == named | {logprobs.tokens[0]: -ids[0] / 1000}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for part in parts if part is not None for entry in getattr(part, name)]
        assert joined == getattr(logprobs, name)


async def test_every_sampling_field_reaches_the_desk(system: System) -> None:
    body = {
        "prompt": "hello",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "logit_bias": {"17": -100, "20": 1.5},
        "logprobs": 0,
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "seed": -1,
        "priority": -3,
        "user": "somebody",
        "best_of": 1,
    }
    headers = {"X-Request-Timeout-Ms": "1500", "X-Request-Id": "mine"}
    response = await system.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine"
    request = system.desk.requests[0]
    sampling = request.sampling
    for name in ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert getattr(sampling, name) == body[name]
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 2.0)
    assert sampling.logit_bias == ((17, -100.0), (20, 1.5))
    assert (sampling.logprobs, sampling.stop_token_ids, sampling.ignore_eos) == (0, (5, 6), True)
    assert (request.seed, request.priority, request.deadline_s) == (2**63 - 1, -3, 1.5)


async def test_nulls_mean_not_sent(system: System) -> None:
    body = dict.fromkeys(
        ("n", "stop", "stream", "temperature", "logprobs", "seed", "user", "logit_bias", "echo")
    )
    response = await system.http.post("/v1/completions", json={"prompt": "hello", **body})
    assert response.status_code == 200
    assert system.desk.requests[0].sampling.max_tokens == 16


# Chat


async def test_a_chat(system: System) -> None:
    ids = [*system.ids("hi 😀"), END]
    system.desk.script = lambda request: say(ids)
    answer = await system.client.chat.completions.create(model="small-model", messages=USER)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "hi 😀"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    request = system.desk.requests[0]
    assert request.prompt_tokens == system.text.encode_chat(USER)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_tokens) // 4
    assert request.sampling.max_tokens == 128 - answer.usage.prompt_tokens


async def test_a_streamed_chat(system: System) -> None:
    system.desk.script = lambda request: say([*system.ids("hi 😀"), END])
    stream = await system.client.chat.completions.create(
        model="small-model", messages=USER, stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    for index in (0, 1):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert parts[0].delta.role == "assistant"
        assert parts[0].delta.content == ""
        assert "".join(part.delta.content or "" for part in parts) == "hi 😀"
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]


async def test_the_clients_own_stream_helper_understands_it(system: System) -> None:
    system.desk.script = lambda request: say([*system.ids("hi there"), END])
    async with system.client.chat.completions.stream(model="small-model", messages=USER) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "hi there"


async def test_messages_in_parts_and_token_limits(system: System) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 5}
    assert (await system.http.post("/v1/chat/completions", json=body)).status_code == 200
    expected = system.text.encode_chat([{"role": "user", "content": "hello\nworld"}])
    assert system.desk.requests[0].prompt_tokens == expected
    assert system.desk.requests[0].sampling.max_tokens == 5


async def test_logprobs_of_a_chat(system: System) -> None:
    ids = [*system.ids("😀!"), END]
    system.desk.script = lambda request: say(ids)
    answer = await system.client.chat.completions.create(
        model="small-model", messages=USER, logprobs=True, top_logprobs=1
    )
    stream = await system.client.chat.completions.create(
        model="small-model", messages=USER, logprobs=True, top_logprobs=1, stream=True
    )
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or []) == "😀!<|end|>".encode()
    assert [entry.logprob for entry in logprobs.content] == [-token / 1000 for token in ids]
    assert [entry.top_logprobs[0].logprob for entry in logprobs.content] == [-0.3] * len(ids)
    assert [entry for part in parts if part for entry in part.content or []] == logprobs.content


# Pages


async def test_models(system: System) -> None:
    listed = await system.client.models.list()
    (card,) = (await system.http.get("/v1/models")).json()["data"]
    assert card["vocab_size"] == 400
    assert [model.id for model in listed.data] == ["small-model"]
    assert (await system.client.models.retrieve("small-model")).owned_by == "pdserve"
    with pytest.raises(openai.NotFoundError):
        await system.client.models.retrieve("other/model")


async def test_a_served_name_replaces_the_models_own(text: TextModel) -> None:
    async with running(text, served_model_name="org/chosen") as system:
        assert (await system.client.models.retrieve("org/chosen")).id == "org/chosen"
        answer = await system.client.completions.create(model="org/chosen", prompt="hello", max_tokens=1)
        assert answer.model == "org/chosen"
        refused = await system.http.post("/v1/completions", json={"model": "small-model", "prompt": "hello"})
        assert refused.status_code == 404


async def test_health_ready_version(system: System) -> None:
    assert (await system.http.get("/health")).json() == {"status": "ok"}
    assert (await system.http.get("/version")).json() == {"version": pdserve.__version__}
    assert (await system.http.get("/ready")).json()["ready"] is True
    system.desk.ready = Readiness(False, "1 of 2 prefill workers is loading", {"decode": 1})
    response = await system.http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {
        "ready": False,
        "reason": "1 of 2 prefill workers is loading",
        "workers": {"decode": 1},
    }


async def test_before_any_worker_is_there(text: TextModel) -> None:
    desk = FakeDesk(info=None, ready=Readiness(False, "no worker yet"))
    async with running(text, desk) as system:
        assert (await system.http.get("/v1/models")).json()["data"] == []
        response = await system.http.post("/v1/completions", json={"prompt": "hello"})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "no worker yet" in response.json()["error"]["message"]


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "'prompt' is required"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": [1, "a"]}, "prompt", "a list of strings"),
        ({"prompt": [True]}, "prompt", "a list of token ids"),
        ({"prompt": [400]}, "prompt", "token id 400"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": ["a"] * 257}, "prompt", "at most 256"),
        ({"n": 0}, "n", "between 1 and 128, got 0"),
        ({"n": 129}, "n", "got 129"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "100 x 100"),
        ({"max_tokens": 0}, "max_tokens", "between 1"),
        ({"max_tokens": "5"}, "max_tokens", "'max_tokens' must be an integer"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "at most 'max_tokens' (5)"),
        ({"temperature": -0.1}, "temperature", "between 0 and 100"),
        ({"temperature": 101}, "temperature", "between 0 and 100"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "got -2"),
        ({"min_p": 2}, "min_p", "between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.001 and 100"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "between -2 and 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "token id 400"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "token ids, got 'hello'"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids, got '999"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["a" * 1025]}, "stop", "got one of 1025"),
        ({"stop": ["a", 1]}, "stop[1]", "a string, got 1"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "token id 400"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "an integer, got true"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"best_of": 2}, "best_of", "equals 'n'"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "'include_usage': true",
        ),
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
        ({"priority": 2**40}, "priority", "between"),
    ],
)
async def test_bad_completions_name_the_field(
    system: System, body: dict[str, Any], param: str, message: str
) -> None:
    error = await system.refuse(**({"prompt": "hello"} | body if body else {}))
    assert error["status"] == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert await system.ended() == [("completions", "invalid_request", 400)]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role",
            "'system', 'user' or 'assistant'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "parts of the form",
        ),
        (
            {"messages": [*USER, {"role": "system", "content": "late"}]},
            "messages",
            "system messages come first",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "must not differ"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"echo": True}, "echo", "unknown field"),
    ],
)
async def test_bad_chats_name_the_field(
    system: System, body: dict[str, Any], param: str, message: str
) -> None:
    error = await system.refuse("/v1/chat/completions", **({"messages": USER} | body))
    assert (error["status"], error["param"]) == (400, param)
    assert message in error["message"]


async def test_too_long_says_how_long(system: System) -> None:
    error = await system.refuse(prompt=[5] * 100, max_tokens=29)
    assert (error["status"], error["code"]) == (400, "context_length_exceeded")
    assert all(number in error["message"] for number in ("100", "29", "129", "128"))
    error = await system.refuse(prompt=[5] * 128)
    assert (error["status"], error["param"]) == (400, "prompt")
    response = await system.http.post("/v1/completions", json={"prompt": [5] * 120})
    assert response.json()["usage"]["completion_tokens"] == 8


async def test_what_no_pool_can_hold_is_refused_here(text: TextModel) -> None:
    desk = FakeDesk(info=replace(MODEL_INFO, num_blocks=4))  # of 16 tokens; the model takes 128
    async with running(text, desk) as system:
        error = await system.refuse(prompt=[5] * 40, max_tokens=25)
        assert (error["status"], error["code"], error["param"]) == (
            400,
            "context_length_exceeded",
            "max_tokens",
        )
        assert "the largest KV pool holds 64 tokens" in error["message"]
        assert "engine.kv_memory" in error["message"]
        error = await system.refuse(prompt=[5] * 64)
        assert (error["status"], error["param"]) == (400, "prompt")
        response = await system.http.post("/v1/completions", json={"prompt": [5] * 60})
        assert response.json()["usage"]["completion_tokens"] == 4  # as far as there is room


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b"\xff"]
)
async def test_bodies_that_are_no_json_object(system: System, content: bytes) -> None:
    response = await system.http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert "pydantic" not in response.text


async def test_unknown_models_paths_methods(system: System) -> None:
    error = await system.refuse(model="other", prompt="hello")
    assert (error["status"], error["code"]) == (404, "model_not_found")
    response = await system.http.get("/v1/nothing")
    assert response.status_code == 404
    assert "/v1/nothing" in response.json()["error"]["message"]
    assert (await system.http.get("/v1/completions")).status_code == 405


async def test_large_bodies(text: TextModel) -> None:
    async with running(text, limits=ApiLimits(max_body_bytes=1000), inline_body_bytes=100) as system:
        response = await system.http.post("/v1/completions", json={"prompt": "hello " * 20, "max_tokens": 1})
        assert response.status_code == 200  # parsed on a thread
        response = await system.http.post("/v1/completions", json={"prompt": "x" * 1000})
        assert response.status_code == 413
        assert "1000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("value", ["soon", "0", "-5", "9" * 5000])
async def test_a_bad_deadline(system: System, value: str) -> None:
    headers = {"X-Request-Timeout-Ms": value}
    response = await system.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Request-Timeout-Ms")


async def test_a_model_without_a_tokeniser_is_served_by_ids() -> None:
    async with running(TextModel(None)) as system:
        response = await system.http.post("/v1/completions", json={"prompt": "hello"})
        assert response.status_code == 400
        assert "return_token_ids" in response.json()["error"]["message"]
        body = {"prompt": [1, 2], "max_tokens": 3, "return_token_ids": True, "logprobs": 0}
        choice = (await system.http.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", [1, 2, 1])
        assert choice["logprobs"]["tokens"] == ["token_id:1", "token_id:2", "token_id:1"]


# Failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("the queue is full", retry_after_s=2.3), 429, "3"),
        (Unavailable("no decode worker is ready"), 503, "1"),
        (WorkerLost("decode-0 died"), 503, "1"),
        (RequestTooLong("more than the pool holds"), 400, None),
        (DeadlineExceeded("the deadline has passed"), 504, None),
        (RuntimeError("a bug with secrets"), 500, None),
    ],
)
async def test_errors_before_the_first_token_have_their_status(
    system: System,
    error: Exception,
    status: int,
    retry_after: str | None,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    system.desk.script = lambda request: [error]
    response = await system.http.post("/v1/completions", json={"prompt": "hello", "stream": stream})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    message = response.json()["error"]["message"]
    assert "secrets" not in message
    assert (str(error) == message) == (status != 500)
    assert (await system.ended())[0][2] == status
    assert bool(caplog.records) == (status == 500)


async def test_an_error_in_a_stream_reaches_the_client(system: System) -> None:
    script = [OutputDelta(pack_tokens(system.ids("hello"))), WorkerLost("decode-0 died")]
    system.desk.script = lambda request: script
    stream = await system.client.completions.create(model="small-model", prompt="x", stream=True)
    assert (await anext(stream)).choices[0].text == "hello"
    with pytest.raises(openai.APIError, match="decode-0 died"):
        await anext(stream)
    assert await system.ended() == [("completions", "worker_lost", 503)]


async def test_one_failing_choice_ends_the_others(system: System) -> None:
    hold = Hold()
    first: list[Step] = [OutputDelta(pack_tokens([5])), hold]
    scripts = iter([first, [WorkerLost("decode-0 died")]])
    system.desk.script = lambda request: next(scripts)
    response = await system.http.post("/v1/completions", json={"prompt": "x", "n": 2})
    assert response.status_code == 503
    assert system.desk.closed == ["fake-1"]


async def test_a_stream_that_just_stops_is_an_error(system: System) -> None:
    system.desk.script = lambda request: [OutputDelta(pack_tokens([5]))]
    response = await system.http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_before", [0, 2])
async def test_a_client_that_leaves_closes_the_request(
    system: System, stream: bool, n: int, num_before: int
) -> None:
    holds = [Hold() for _ in range(n)]
    waiting = iter(holds)
    before: list[Step] = [OutputDelta(pack_tokens([50]))] * num_before
    system.desk.script = lambda request: [*before, next(waiting)]
    body = {"prompt": "hello", "stream": stream, "n": n}
    asking = asyncio.create_task(system.http.post("/v1/completions", json=body))
    for hold in holds:
        await hold.reached.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await system.desk.at_rest.wait()
    assert len(system.desk.closed) == n
    assert await system.ended() == [("completions", "cancelled", 499)]


async def test_stopping_the_server_ends_open_streams(text: TextModel) -> None:
    desk = FakeDesk()
    hold = Hold()
    desk.script = lambda request: [OutputDelta(pack_tokens([50])), hold]
    seen = Seen()
    server = await serve_http(create_app(desk, text, observer=seen), "127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "stream": True}))
        await hold.reached.wait()
        await server.stop(grace_s=0)
        await asyncio.gather(asking, return_exceptions=True)
    assert desk.closed == ["fake-1"]
    assert seen.ended == [("completions", "cancelled", 499)]


def test_an_idle_connection_is_closed_by_the_official_client_first() -> None:
    kept_s = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert kept_s is not None
    assert kept_s < IDLE_TIMEOUT_S


async def test_a_port_in_use_is_named(text: TextModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            await serve_http(create_app(FakeDesk(), text), "127.0.0.1", port)


async def test_finish_reasons(system: System) -> None:
    system.desk.script = lambda request: say([5, 6], finish=FinishReason.LENGTH)
    answer = await system.client.completions.create(model="small-model", prompt="x", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == system.text.decode_ids([5, 6])


# Clients that do not read

NUM_LONG = 600
"""Tokens, of which `long_answer` has much more to say than the buffers of a narrow connection hold."""


def long_answer() -> dict[str, Any]:
    """A streamed chat with much to say of each token."""
    return {"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 20, "return_token_ids": True}


def ids_of(answer: bytes) -> list[list[int]]:
    """The ids of each event that has some."""
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    return [event["choices"][0]["token_ids"] for event in events if "token_ids" in event["choices"][0]]


async def test_a_client_that_stops_reading_is_cut(text: TextModel) -> None:
    desk = FakeDesk(endless)
    async with running(text, desk, limits=ApiLimits(max_unread_tokens=64)) as system:
        async with slow_client(system.url, "/v1/chat/completions", long_answer()) as client:
            await client.read_until(b"data: ")
            assert await system.ended() == [("chat", "client_too_slow", 408)]
            assert desk.closed == ["fake-1"]
            assert not (await client.read_to_the_end()).endswith(b"0\r\n\r\n")  # how a whole answer ends


async def test_a_client_that_reads_on_in_time_misses_nothing(text: TextModel) -> None:
    ids = [50 + i % 100 for i in range(NUM_LONG)]
    desk = FakeDesk(lambda request: say(ids, finish=FinishReason.LENGTH))
    async with running(text, desk, limits=ApiLimits(max_unread_tokens=NUM_LONG)) as system:
        async with slow_client(system.url, "/v1/chat/completions", long_answer()) as client:
            await desk.started.wait()
            await desk.at_rest.wait()  # everything is generated, and much of it waits
            answer = await client.read_until(b"[DONE]")
    events = ids_of(answer)
    assert [token_id for event in events for token_id in event] == ids
    assert max(map(len, events)) > 64  # what waited has become one event
    assert answer.count(b'"finish_reason":"length"') == 1


async def test_a_client_that_does_not_read_cannot_outlive_its_deadline(text: TextModel) -> None:
    desk = FakeDesk(lambda request: say([50] * NUM_LONG))
    async with running(text, desk, limits=ApiLimits(max_unread_tokens=NUM_LONG)) as system:
        headers = {"X_Request_Timeout_Ms": "1000"}
        async with slow_client(system.url, "/v1/chat/completions", long_answer(), **headers) as client:
            assert await system.ended() == [("chat", "deadline_exceeded", 504)]
            assert not (await client.read_to_the_end()).endswith(b"0\r\n\r\n")
    assert desk.closed == []  # everything had been generated in time
