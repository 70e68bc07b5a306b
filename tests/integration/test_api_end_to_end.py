"""The HTTP API over real workers: text, sampling fields, errors and usage, with the official client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from google.protobuf.json_format import MessageToDict

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.contract.tokens import unpack_tokens
from pdserve.engine.settings import EngineSettings
from router.request_reports import Origin
from router.text import TextModel
from tests.local_system import LocalSystem
from tests.reference import greedy_reference
from tests.small_models import VOCAB_SIZE, SmallModel, make_model
from tests.small_tokenizers import byte_level_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path_factory.mktemp("llama"), seed=1)
    byte_level_tokenizer(VOCAB_SIZE).save(str(model.folder / "tokenizer.json"))
    return model


@pytest.fixture
async def system(model: SmallModel) -> AsyncIterator[LocalSystem]:
    settings = EngineSettings(
        str(model.folder), served_name="small", dtype="float32", threads=1, kv_memory_bytes=4 << 20
    )
    async with LocalSystem(settings) as system:
        yield system
        await system.at_rest()


@pytest.fixture
async def client(system: LocalSystem) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def text_model(model: SmallModel) -> TextModel:
    return TextModel.load(model.folder)


def greedy_text(model: SmallModel, text_model: TextModel, num_tokens: int) -> tuple[list[int], str]:
    prompt = unpack_tokens(text_model.encode(PROMPT))
    output = greedy_reference(model.reference, prompt, num_tokens)
    return output, text_model.decode_ids(output)


async def test_text_equals_the_decoded_reference(
    client: openai.AsyncOpenAI, model: SmallModel, text_model: TextModel
) -> None:
    output, text = greedy_text(model, text_model, 24)
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = await client.completions.create(
        model="small", prompt=PROMPT, max_tokens=24, temperature=0, extra_body=extra
    )
    assert answer.choices[0].model_extra["token_ids"] == output
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    pieces = ""
    stream = await client.completions.create(
        model="small",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        pieces += chunk.choices[0].text
    assert pieces == text


async def test_a_stop_string_across_tokens_ends_the_request_at_the_workers(
    client: openai.AsyncOpenAI, system: LocalSystem, model: SmallModel, text_model: TextModel
) -> None:
    _, text = greedy_text(model, text_model, 24)
    stop = text[6:10]
    answer = await client.completions.create(
        model="small",
        prompt=PROMPT,
        max_tokens=400,
        temperature=0,
        stop=stop,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    await system.at_rest()
    assert system.metric("decode-0", "worker_requests_total", outcome="stop") == 1
    assert system.metric("decode-0", "generated_tokens_total") < 200  # of 400


async def test_log_probabilities_are_the_models_own(
    client: openai.AsyncOpenAI, model: SmallModel, text_model: TextModel
) -> None:
    output, _ = greedy_text(model, text_model, 8)
    answer = await client.completions.create(
        model="small", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    prompt = unpack_tokens(text_model.encode(PROMPT))
    with torch.inference_mode():
        logits = model.reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(8), output]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert logprobs.top_logprobs is not None
    best = [max(top.values()) for top in logprobs.top_logprobs]  # greedy: the chosen token's
    assert best == pytest.approx(expected.tolist(), abs=1e-4)


async def test_n_answers_differ_and_are_reproducible(client: openai.AsyncOpenAI) -> None:
    answers = [
        await client.completions.create(
            model="small", prompt=PROMPT, max_tokens=12, n=3, seed=5, temperature=1.0
        )
        for _ in range(2)
    ]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


async def test_usage_counts_and_cached_tokens(client: openai.AsyncOpenAI, text_model: TextModel) -> None:
    prompt = PROMPT * 4
    num_prompt = len(unpack_tokens(text_model.encode(prompt)))
    usages = []
    for _ in range(2):
        answer = await client.completions.create(model="small", prompt=prompt, max_tokens=4, temperature=0)
        assert answer.usage is not None
        usages.append(answer.usage)
    assert [usage.prompt_tokens for usage in usages] == [num_prompt] * 2
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage.prompt_tokens_details]
    assert cached == [0, (num_prompt - 1) // 16 * 16]


def kv_bytes(model: SmallModel, num_tokens: int) -> int:
    """Of the KV of so many tokens in whole blocks of 16, by the model's own configuration, in float32."""
    config = model.reference.config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 4
    return -(-num_tokens // 16) * 16 * per_token


def assert_adds_up(timings: dict[str, Any], num_bytes: int) -> None:
    """Of a request that was served at its first attempt, cold."""
    (attempt,) = timings["attempts"]
    assert (timings["num_attempts"], attempt["number"]) == (1, 1)
    assert (attempt["decode_worker"], attempt["prefill_worker"]) == ("decode-0", "prefill-0")
    assert attempt["cached_tokens"] == {"prefill": 0, "decode": 0}
    transfer = attempt["transfer"]
    assert (transfer["transport"], transfer["is_whole"]) == ("shared_memory", True)
    assert transfer["bytes"] == num_bytes
    durations = [
        attempt["prefill_queue_s"],
        attempt["prefill_s"],
        transfer["hidden_s"],
        transfer["exposed_s"],
    ]
    assert min(durations) >= 0
    prefill_ended_s = attempt["submitted_s"] + attempt["prefill_queue_s"] + attempt["prefill_s"]
    verified_s = prefill_ended_s + transfer["exposed_s"]
    rounding_s = 4e-6  # of sums of at most four times, each told in whole microseconds
    assert 0 <= attempt["submitted_s"] <= prefill_ended_s <= timings["first_token_s"] + rounding_s
    assert verified_s <= timings["second_token_s"] + rounding_s
    assert timings["first_token_s"] == attempt["first_token_s"]
    assert timings["first_token_s"] < timings["second_token_s"] < timings["last_token_s"]
    assert timings["last_token_s"] == attempt["ended_s"]


async def test_timings_in_the_answer_add_up(
    client: openai.AsyncOpenAI, system: LocalSystem, model: SmallModel
) -> None:
    prompts = [[5 + i] * 100 for i in range(3)]
    extra = {"timings": True, "ignore_eos": True}
    whole = await client.completions.create(
        model="small",
        prompt=prompts[:2],
        max_tokens=8,
        extra_body=extra,
        extra_headers={"X-Request-Id": "mine"},
    )
    assert whole.choices[0].model_extra is not None
    for choice in whole.choices:
        timings = choice.model_extra["timings"]
        assert_adds_up(timings, kv_bytes(model, 100))
        report = system.router.report(timings["request_id"])
        assert report is not None
        assert (report.outcome, report.num_prompt_tokens, report.num_output_tokens) == ("length", 100, 8)
        assert report.origin == Origin("completions", "small", whole.id, choice.index, "mine")
    stream = await client.completions.create(
        model="small", prompt=prompts[2], max_tokens=8, stream=True, extra_body=extra
    )
    choices = [chunk.choices[0] async for chunk in stream]
    told = [choice.model_extra for choice in choices if choice.model_extra]
    assert choices[-1].finish_reason == "length"
    assert told == [choices[-1].model_extra]
    assert_adds_up(told[0]["timings"], kv_bytes(model, 100))


async def test_nobody_is_told_timings_who_has_not_asked(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="small", prompt=PROMPT, max_tokens=2)
    assert "timings" not in (answer.choices[0].model_extra or {})


async def test_a_stop_string_ends_the_answer_before_the_attempt(
    client: openai.AsyncOpenAI, system: LocalSystem, model: SmallModel, text_model: TextModel
) -> None:
    _, text = greedy_text(model, text_model, 24)
    answer = await client.completions.create(
        model="small",
        prompt=PROMPT,
        max_tokens=400,
        temperature=0,
        stop=text[6:9],
        extra_body={"timings": True, "ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra is not None
    timings = answer.choices[0].model_extra["timings"]
    assert [attempt["decode_worker"] for attempt in timings["attempts"]] == ["decode-0"]
    await system.at_rest()
    report = system.router.report(timings["request_id"])
    assert report is not None
    assert (report.outcome, [attempt.end for attempt in report.attempts]) == ("stop", ["stop"])


async def test_what_cannot_be_is_refused_with_the_cause(
    client: openai.AsyncOpenAI, system: LocalSystem
) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await client.completions.create(model="small", prompt=PROMPT, max_tokens=10_000)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        await client.completions.create(model="small", prompt=[VOCAB_SIZE + 5])
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await client.completions.create(model="other", prompt=PROMPT)
    async with httpx.AsyncClient(base_url=system.url) as http:
        answer = await http.post("/v1/completions", json={"model": "small", "prompt": "x", "suffix": "y"})
        assert answer.status_code == 400
        assert "suffix" in answer.json()["error"]["message"]


async def test_the_metrics_of_one_request(system: LocalSystem) -> None:
    async with httpx.AsyncClient(base_url=system.url) as http:
        body = {"prompt": list(range(3, 103)), "max_tokens": 8, "ignore_eos": True}
        (await http.post("/v1/completions", json=body)).raise_for_status()
    await system.at_rest()
    assert system.metric("prefill-0", "prompt_tokens_total") == 100
    assert system.metric("prefill-0", "generated_tokens_total") == 1
    assert system.metric("prefill-0", "prefill_calls_total", outcome="sealed") == 1
    assert system.metric("decode-0", "generated_tokens_total") == 7
    assert system.metric("decode-0", "worker_requests_total", outcome="length") == 1
    block_bytes = system.workers["decode-0"]._info.block_bytes
    received = system.metric("decode-0", "kv_transfer_bytes_total", transport="shared_memory")
    assert received == 7 * block_bytes  # 100 tokens in blocks of 16
    seconds = system.metric("decode-0", "kv_segment_seconds_sum", transport="shared_memory")
    assert 0 < seconds < 10
    sample = system.router.registry.get_sample_value
    assert sample("pdserve_time_to_first_token_seconds_count") == 1
    assert sample("pdserve_inter_token_seconds_count") == 7
    assert sample("pdserve_router_requests_total", {"outcome": "length"}) == 1


async def test_what_no_pool_holds_is_refused_before_a_worker_is_asked(model: SmallModel) -> None:
    settings = EngineSettings(str(model.folder), dtype="float32", threads=1, kv_memory_bytes=256 << 10)
    async with LocalSystem(settings) as system:
        pool_tokens = {worker._info.pool_tokens for worker in system.workers.values()}
        assert max(pool_tokens) < 400 < 512  # the model's length
        async with httpx.AsyncClient(base_url=system.url) as http:
            answer = await http.post("/v1/completions", json={"prompt": [5] * 300, "max_tokens": 100})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert f"the largest KV pool holds {max(pool_tokens)} tokens" in answer.json()["error"]["message"]
        assert system.router.registry.get_sample_value("pdserve_router_attempts_total") == 0


async def test_the_grpc_api_says_the_same(
    system: LocalSystem, model: SmallModel, text_model: TextModel
) -> None:
    output, _ = greedy_text(model, text_model, 24)
    request = pb.GenerateRequest(
        text=PROMPT,
        max_tokens=24,
        return_token_ids=True,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(system.grpc_address) as channel:
        answer = await pb_grpc.GenerationStub(channel).Generate(request)
    assert list(answer.choices[0].token_ids) == output
    assert not answer.choices[0].HasField("timings")


async def test_the_grpc_api_tells_the_same_timings(system: LocalSystem, model: SmallModel) -> None:
    for first, streamed in ((5, False), (6, True)):
        prompt = pb.TokenIds(ids=[first] * 100)
        request = pb.GenerateRequest(
            token_ids=prompt, max_tokens=8, timings=True, sampling=pb.Sampling(ignore_eos=True)
        )
        async with grpc.aio.insecure_channel(system.grpc_address) as channel:
            stub = pb_grpc.GenerationStub(channel)
            if streamed:
                told = [chunk.choice async for chunk in stub.GenerateStream(request)]
                (choice,) = [choice for choice in told if choice.HasField("timings")]
                assert choice.finish_reason == pb.FINISH_REASON_LENGTH
            else:
                choice = (await stub.Generate(request)).choices[0]
        timings = MessageToDict(
            choice.timings,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        (transfer,) = [attempt["transfer"] for attempt in timings["attempts"]]
        transfer["bytes"] = int(transfer["bytes"])  # JSON has no 64-bit integers
        assert_adds_up(timings, kv_bytes(model, 100))


async def test_many_clients_at_once_leave_nothing_behind(system: LocalSystem) -> None:
    async def one(index: int, http: httpx.AsyncClient) -> int:
        body = {
            "model": "small",
            "prompt": f"{index} {PROMPT}",
            "max_tokens": 8,
            "stream": True,
            "ignore_eos": True,
        }
        num_events = 0
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:])
                    num_events += 1
                if index % 3 == 0 and num_events == 2:
                    break  # leaves in mid-stream
        return num_events

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=system.url, limits=limits, timeout=60) as http:
        counts = await asyncio.gather(*(one(index, http) for index in range(48)))
    assert all(count >= 1 for count in counts)
    await system.at_rest()
