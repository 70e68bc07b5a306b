"""Every sampling field through HTTP and two pools: the tokens are those of transformers' own `generate()`
with the same option, or those that the slow sampler draws from transformers' logits."""

from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types import CompletionChoice
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SampleRequest
from pdserve.engine.settings import EngineSettings
from tests.local_system import LocalSystem
from tests.reference import adjusted_reference, exact_copy, mixed_prompts, tokens_chosen_by
from tests.slow_sampler import reference_token
from tests.small_models import VOCAB_SIZE, make_model

NUM_OUTPUT = 20
PROMPTS = mixed_prompts(9, 16, 32, VOCAB_SIZE)[1::3]
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def exact(folder: Path) -> PreTrainedModel:
    torch.set_num_threads(1)
    return exact_copy(make_model("llama", folder, seed=1).reference)


@pytest.fixture(scope="module")
def plain(exact: PreTrainedModel) -> list[list[int]]:
    """What greedy choice says when nothing else is asked for."""
    return [adjusted_reference(exact, prompt, NUM_OUTPUT) for prompt in PROMPTS]


@pytest.fixture
async def system(folder: Path, exact: PreTrainedModel) -> AsyncIterator[LocalSystem]:
    async with LocalSystem(engine_settings(folder)) as system:
        yield system
        await system.at_rest()


def engine_settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        str(folder), served_name="m", dtype="float32", threads=1, kv_memory_bytes=4 << 20, chunk_tokens=32
    )


# What changes the logits.


class OutputPenalties(LogitsProcessor):
    """OpenAI's definition, which transformers has not: over output tokens, once per token and per use."""

    def __init__(self, presence: float, frequency: float, num_prompt: int):
        self._presence, self._frequency, self._num_prompt = presence, frequency, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self._num_prompt :].unique():
            uses = int((input_ids[0, self._num_prompt :] == token).sum())
            scores[0, token] -= self._presence + self._frequency * uses
        return scores


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        (
            {"logit_bias": {"17": 9.5, "200": 8.0, "5": -100.0}},
            {"sequence_bias": [[[17], 9.5], [[200], 8.0], [[5], -100.0]]},
        ),
    ],
    ids=["repetition", "wanted repetition", "bias"],
)
async def test_greedy_with_an_option_of_transformers(
    system: LocalSystem, exact: PreTrainedModel, plain: list[list[int]], asked: Fields, options: Fields
) -> None:
    expected = [adjusted_reference(exact, prompt, NUM_OUTPUT, **options) for prompt in PROMPTS]
    assert await outputs(system, {"temperature": 0, "ignore_eos": True} | asked) == expected
    assert expected != plain, "the field is meant to matter"


@pytest.mark.parametrize(("presence", "frequency"), [(1.8, 0.0), (0.0, 1.8), (-2.0, -1.0)])
async def test_greedy_with_penalties_for_the_output(
    system: LocalSystem, exact: PreTrainedModel, plain: list[list[int]], presence: float, frequency: float
) -> None:
    expected = []
    for prompt in PROMPTS:
        processors = LogitsProcessorList([OutputPenalties(presence, frequency, len(prompt))])
        expected.append(adjusted_reference(exact, prompt, NUM_OUTPUT, logits_processor=processors))
    asked = {"presence_penalty": presence, "frequency_penalty": frequency}
    assert await outputs(system, {"temperature": 0, "ignore_eos": True} | asked) == expected
    assert expected != plain, "the field is meant to matter"


# What is drawn.


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.6},
        {"min_p": 0.2},
        {"top_k": 4},
        {"top_p": 0.7},
        {"logit_bias": ((17, 9.5),)},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "presence_penalty": 1.0},
    ],
    ids=lambda asked: "+".join(asked) or "nothing",
)
async def test_drawn_tokens_are_the_slow_sampler_s(
    system: LocalSystem, exact: PreTrainedModel, asked: Fields
) -> None:
    seed = 12345678901234567
    params = SamplingParams(**({"temperature": 2.0, "ignore_eos": True} | asked))
    expected = [drawn(exact, prompt, params, seed) for prompt in PROMPTS]
    assert await outputs(system, as_fields(params) | {"seed": seed}) == expected


def drawn(exact: PreTrainedModel, prompt: tuple[int, ...], params: SamplingParams, seed: int) -> list[int]:
    def draw(tokens: list[int], logits: torch.Tensor) -> int:
        request = SampleRequest(
            params, seed, len(tokens), len(tokens) - len(prompt), pack_tokens(tokens), len(prompt)
        )
        return reference_token(logits, request, ())

    return tokens_chosen_by(draw, exact, prompt, NUM_OUTPUT)


def as_fields(params: SamplingParams) -> Fields:
    """The fields of a request that mean `params`."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    values["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    return values | {"max_tokens": NUM_OUTPUT}


async def test_a_min_p_of_one_leaves_the_best_token_at_any_temperature(
    system: LocalSystem, plain: list[list[int]]
) -> None:
    assert await outputs(system, {"temperature": 2.0, "min_p": 1.0, "ignore_eos": True}) == plain


# What ends the output.


@pytest.mark.parametrize("place", [0, 1, 7])
async def test_a_stop_token_ends_the_output(system: LocalSystem, plain: list[list[int]], place: int) -> None:
    for prompt, whole in zip(PROMPTS, plain, strict=True):
        stops = [whole[place], 3]
        choice = await complete(
            system, prompt, {"temperature": 0, "stop_token_ids": stops, "ignore_eos": True}
        )
        first = min(whole.index(token) for token in stops if token in whole)
        assert ids_of(choice) == whole[: first + 1]
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("place", [0, 1, 7])
async def test_the_model_s_own_end(
    tmp_path: Path, exact: PreTrainedModel, plain: list[list[int]], place: int
) -> None:
    """A model whose end token is one that its answer holds at `place`. As the first token it comes from the
    prefill worker, and what has not left by then of the prompt's KV need not travel."""
    prompt, whole = PROMPTS[0], plain[0]
    end = whole[place]
    make_model("llama", tmp_path, seed=1, eos_token_id=end)
    expected = adjusted_reference(exact, prompt, NUM_OUTPUT, eos_token_id=end)
    assert expected == whole[: whole.index(end) + 1]
    async with LocalSystem(engine_settings(tmp_path)) as system:
        choice = await complete(system, prompt, {"temperature": 0})
        assert (ids_of(choice), choice.finish_reason) == (expected, "stop")
        num_moved = system.metric("decode-0", "kv_transfer_bytes_total", transport="shared_memory")
        assert num_moved > 0 or len(expected) == 1
        choice = await complete(system, prompt, {"temperature": 0, "ignore_eos": True})
        assert (ids_of(choice), choice.finish_reason) == (whole, "length")
        await system.at_rest()


@pytest.mark.parametrize("min_tokens", [1, 5, NUM_OUTPUT])
async def test_no_end_before_min_tokens(
    tmp_path: Path, exact: PreTrainedModel, plain: list[list[int]], min_tokens: int
) -> None:
    """Neither the model's own end nor a stop token; afterwards both."""
    prompt, whole = PROMPTS[-1], plain[-1]
    end, stop = whole[0], whole[1]
    make_model("llama", tmp_path, seed=1, eos_token_id=end)
    expected = adjusted_reference(
        exact, prompt, NUM_OUTPUT, eos_token_id=[end, stop], min_new_tokens=min_tokens
    )
    ended = expected[-1] in (end, stop)
    async with LocalSystem(engine_settings(tmp_path)) as system:
        asked = {"temperature": 0, "min_tokens": min_tokens, "stop_token_ids": [stop]}
        choice = await complete(system, prompt, asked)
        assert (ids_of(choice), choice.finish_reason) == (expected, "stop" if ended else "length")
        await system.at_rest()


# What is told about it.


async def test_log_probabilities_are_the_model_s_own(system: LocalSystem, exact: PreTrainedModel) -> None:
    """Of the first token, which the prefill worker samples, and of the others, whatever changed the draw."""
    asked = {"logprobs": 4, "temperature": 0.7, "top_k": 5, "seed": 3, "logit_bias": {"17": 5.0}}
    for prompt in PROMPTS:
        choice = await complete(system, prompt, asked | {"ignore_eos": True})
        output = ids_of(choice)
        with torch.inference_mode():
            logits = exact(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        told = choice.logprobs
        assert told is not None
        assert told.token_logprobs == pytest.approx(expected[range(NUM_OUTPUT), output].tolist(), abs=1e-4)
        assert told.top_logprobs is not None
        for row, top, token in zip(expected, told.top_logprobs, output, strict=True):
            best = row.topk(4).indices.tolist()
            assert set(top) == {f"token_id:{token_id}" for token_id in {*best, token}}
            values = [row[int(name.removeprefix("token_id:"))].item() for name in top]
            assert list(top.values()) == pytest.approx(values, abs=1e-4)


async def outputs(system: LocalSystem, asked: Fields) -> list[list[int]]:
    return [ids_of(await complete(system, prompt, asked)) for prompt in PROMPTS]


async def complete(system: LocalSystem, prompt: tuple[int, ...], asked: Fields) -> CompletionChoice:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(
            model="m",
            prompt=list(prompt),
            max_tokens=NUM_OUTPUT,
            extra_body={"return_token_ids": True} | asked,
        )
    return answer.choices[0]


def ids_of(choice: CompletionChoice) -> list[int]:
    assert choice.model_extra is not None
    token_ids: list[int] = choice.model_extra["token_ids"]
    return token_ids
