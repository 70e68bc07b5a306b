"""Bodies, the jobs made of them, and events, without a socket."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import SeededRng
from pdserve.contract.errors import (
    ErrorCode,
    ErrorInfo,
    InvalidRequest,
    NotFound,
    RequestTooLong,
)
from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import FinishReason, SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import TokenLogprobs
from router.api_settings import ApiSettings
from router.choices import ChoicePiece
from router.intake import Intake, Job, choice_seed
from router.openai_answers import AnswerHead, Usage
from router.openai_errors import error_answer
from router.openai_logprobs import chat_logprobs, completion_logprobs
from router.openai_schema import ChatBody, CompletionBody, parse_fields, parse_json
from router.sse import ChatEvents, CompletionEvents
from router.text import TextModel
from tests.fake_desk import MODEL_INFO
from tests.small_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer

TEXT = TextModel(byte_level_tokenizer(), CHAT_TEMPLATE, {"bos_token": "<|bos|>"})
HEAD = AnswerHead('cmpl-"1"', 1234, 'model "x"\n')
AWKWARD = 'quotes " \\ lines \n\r\u2028\u0085 and 😀\x00'


def intake() -> Intake:
    return Intake(TEXT, ApiSettings(), SeededRng(1))


def completion(**fields: Any) -> Job:
    return intake().completion(parse_fields(CompletionBody, {"prompt": [5, 6, 7], **fields}), MODEL_INFO)


def chat(**fields: Any) -> Job:
    messages = [{"role": "user", "content": "hello"}]
    return intake().chat(parse_fields(ChatBody, {"messages": messages, **fields}), MODEL_INFO)


def events_of(text: str) -> list[dict[str, Any]]:
    """What a client reads: every event is one line of ASCII."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert text.isascii()
    assert all(part.startswith("data: ") and len(part.splitlines()) == 1 for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_defaults() -> None:
    job = completion()
    assert job.choices[0].request.sampling == SamplingParams(max_tokens=16)
    assert (job.stream, job.include_usage, job.echo, job.return_token_ids) == (False, False, False, False)
    assert job.model == "small-model"


def test_json_and_fields_read_alike() -> None:
    fields = {"prompt": ["a", "b"], "stop": "x", "temperature": 0, "logit_bias": {"3": 1}, "stream": True}
    assert parse_json(CompletionBody, json.dumps(fields).encode()) == parse_fields(CompletionBody, fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"prompt": "a", "n": 1.5}', "'n' must be an integer"),
        (b'{"prompt": "a", "n": true}', "'n' must be an integer, got true"),
        (b'{"prompt": "a", "temperature": "hot"}', "'temperature' must be a number, got \"hot\""),
        (b'{"prompt": "a", "stream": 1}', "'stream' must be a boolean, got 1"),
        (b'{"prompt": "a", "stream": "%s"}' % (b"x" * 999), "xxx..."),
        (b'{"prompt": "a", "stop": {"a": 1}}', "'stop' must be a"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b"3", "must be a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_complaints_are_one_plain_sentence(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(CompletionBody, raw)
    complaint = str(caught.value)
    assert message in complaint
    assert len(complaint) < 200
    assert "\n" not in complaint
    assert "pydantic" not in complaint


def test_the_first_of_n_has_the_requests_own_seed_and_the_others_hashes_of_it() -> None:
    seeds = [choice.request.seed for choice in completion(n=100, seed=5).choices]
    assert seeds == [choice_seed(5, i) for i in range(100)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 100
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(5, 1) != choice_seed(6, 1)


def test_a_default_answer_is_as_long_as_there_is_room() -> None:
    assert completion(prompt=[5] * 120).choices[0].request.sampling.max_tokens == 8
    job = chat()
    assert job.choices[0].request.sampling.max_tokens == 128 - job.num_prompt_tokens


def test_prompts_are_counted_once() -> None:
    job = completion(prompt=[[5, 6], [7]], n=3)
    assert job.num_prompt_tokens == 3
    assert [choice.index for choice in job.choices] == list(range(6))
    assert [choice.prompt for choice in job.choices] == [job.prompts[0]] * 3 + [job.prompts[1]] * 3


def test_usage_counts_cached_tokens_once_per_prompt() -> None:
    job = completion(prompt=[[5, 6], [7]], n=2)
    usage = Usage(job)
    for index, cached in enumerate([0, 2, 1, 1]):
        timings = RequestTimings(cached_prompt_tokens_prefill=cached, cached_prompt_tokens_decode=cached // 2)
        usage.add(ChoicePiece(index, "", pack_tokens([1, 2]), finish=FinishReason.STOP, timings=timings))
    assert usage.as_json() == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_completion_events_are_valid_whatever_the_text() -> None:
    job = completion(prompt=AWKWARD, echo=True, return_token_ids=True, stream=True, n=2)
    events = CompletionEvents(job, HEAD, TEXT, Usage(job))
    first, piece = events_of(
        events.first(job.choices[1])
        + events.piece(ChoicePiece(1, AWKWARD, pack_tokens([9, 8]), finish=FinishReason.LENGTH))
    )
    assert first["choices"][0]["text"] == AWKWARD
    assert first["choices"][0]["prompt_token_ids"] == TEXT_IDS
    assert piece == {
        "id": HEAD.answer_id,
        "object": "text_completion",
        "created": 1234,
        "model": HEAD.model,
        "choices": [
            {"index": 1, "text": AWKWARD, "logprobs": None, "finish_reason": "length", "token_ids": [9, 8]}
        ],
    }


def test_chat_events_are_valid_whatever_the_text() -> None:
    job = chat(stream=True, stream_options={"include_usage": True})
    usage = Usage(job)
    events = ChatEvents(job, HEAD, TEXT, usage)
    first, piece, last, total = events_of(
        events.first(job.choices[0])
        + events.piece(ChoicePiece(0, AWKWARD, pack_tokens([9])))
        + events.piece(ChoicePiece(0, "", pack_tokens([9]), finish=FinishReason.STOP))
        + events.usage()
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert piece["choices"][0] == {
        "index": 0,
        "delta": {"content": AWKWARD},
        "logprobs": None,
        "finish_reason": None,
    }
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (piece["usage"], total["choices"], total["usage"]) == (None, [], usage.as_json())
    assert all(event["object"] == "chat.completion.chunk" for event in (first, piece, last, total))


def test_a_piece_whose_text_is_held_back_makes_no_event() -> None:
    piece = ChoicePiece(0, "", pack_tokens([9]))
    silent, silent_chat, with_ids = completion(), chat(), completion(return_token_ids=True)
    assert CompletionEvents(silent, HEAD, TEXT, Usage(silent)).piece(piece) == ""
    assert ChatEvents(silent_chat, HEAD, TEXT, Usage(silent_chat)).piece(piece) == ""
    assert CompletionEvents(with_ids, HEAD, TEXT, Usage(with_ids)).piece(piece) != ""


def test_impossible_tokens_have_a_log_probability_that_json_can_write() -> None:
    logprobs = (TokenLogprobs(-math.inf, ((300, -0.5), (301, -math.inf))),)
    piece = ChoicePiece(0, "", pack_tokens([299]), logprobs, (4,))
    plain = completion_logprobs(piece, 10, TEXT)
    assert (plain["token_logprobs"], plain["text_offset"]) == ([-9999.0], [14])
    entry = chat_logprobs(piece, TEXT)[0]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -9999.0]
    json.dumps([plain, entry], allow_nan=False)


def test_every_error_code_has_an_answer() -> None:
    for code in ErrorCode:
        answer = error_answer(ErrorInfo(code, "why", retry_after_s=0.2), 1.0)
        assert 400 <= answer.status < 600
        assert answer.body["error"]["message"] == "why"
        assert answer.headers == ({"Retry-After": "1"} if answer.status in (429, 503) else {})


def test_the_models_own_limits_are_used() -> None:
    small = replace(MODEL_INFO, vocab_size=6, max_model_len=4)
    with pytest.raises(InvalidRequest, match="token id 6"):
        intake().completion(parse_fields(CompletionBody, {"prompt": [5, 6]}), small)
    job = intake().completion(parse_fields(CompletionBody, {"prompt": [5, 5]}), small)
    assert job.choices[0].request.sampling.max_tokens == 2


FIELDS = sorted(set(CompletionBody.model_fields) | set(ChatBody.model_fields))
numbers = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2, 0.5, 10**30, 2**63])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), st.booleans())
def test_whatever_is_sent_is_a_job_or_a_named_complaint(fields: dict[str, Any], as_chat: bool) -> None:
    try:
        job = chat(**fields) if as_chat else completion(**fields)
    except (InvalidRequest, RequestTooLong, NotFound):
        return
    assert job.choices
    for choice in job.choices:
        sampling = choice.request.sampling
        assert 1 <= sampling.max_tokens <= MODEL_INFO.max_model_len - len(choice.request.prompt_tokens) // 4
        assert sampling.min_tokens <= sampling.max_tokens


TEXT_IDS = byte_level_tokenizer().encode(AWKWARD).ids
