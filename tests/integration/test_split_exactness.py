"""Tokens of a split run equal transformers' own, through HTTP, exactly."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import openai
import pytest
import torch

from controller.worker import WorkerSettings
from pdserve.engine.settings import EngineSettings
from tests.local_system import LocalSystem
from tests.reference import assert_unambiguous, greedy_reference
from tests.small_models import VOCAB_SIZE, SmallModel, make_model

BLOCK, CHUNK, NUM_OUTPUT = 16, 32, 20
LENGTHS = (1, 7, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 4 * CHUNK + 5)

IDS_ONLY = {"return_token_ids": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    torch.set_num_threads(1)
    return make_model("llama", tmp_path_factory.mktemp("llama"), seed=3)


def engine_settings(folder: Path, **fields: object) -> EngineSettings:
    return EngineSettings(
        str(folder), served_name="m", dtype="float32", threads=1, kv_memory_bytes=4 << 20, chunk_tokens=CHUNK, **fields
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(llama: SmallModel) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> transformers' greedy continuation."""
    random = Random(5)
    prompts = [tuple(random.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in LENGTHS]
    prompts += [prompts[-1][: 2 * CHUNK] + tuple(random.randrange(3, VOCAB_SIZE) for _ in range(9)) for _ in range(7)]
    outputs = {prompt: greedy_reference(llama.reference, prompt, NUM_OUTPUT) for prompt in prompts}
    for prompt, output in outputs.items():
        assert_unambiguous(llama.reference, prompt, output)
    return outputs


@pytest.fixture(params=["shared_memory", "grpc", "unsplit"])
async def system(request: pytest.FixtureRequest, llama: SmallModel) -> AsyncIterator[LocalSystem]:
    unsplit = request.param == "unsplit"
    settings = WorkerSettings(transports=("grpc",) if unsplit else (request.param,))
    async with LocalSystem(
        engine_settings(llama.folder), num_prefill=0 if unsplit else 1, worker_settings=settings
    ) as system:
        yield system


async def complete(client: openai.AsyncOpenAI, prompt: tuple[int, ...], **fields: object) -> list[int]:
    """The output's token ids, streamed."""
    stream = await client.completions.create(
        model="m",
        prompt=list(prompt),
        stream=True,
        max_tokens=NUM_OUTPUT,
        temperature=0,
        extra_body=IDS_ONLY,
        **fields,  # type: ignore[call-overload]
    )
    tokens: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            tokens += choice.model_extra.get("token_ids") or []
    return tokens


def client_of(system: LocalSystem) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


async def test_alone_cold_and_warm(system: LocalSystem, expected: dict[tuple[int, ...], list[int]]) -> None:
    async with client_of(system) as client:
        for prompt, output in expected.items():
            assert await complete(client, prompt) == output, f"cold, {len(prompt)} tokens"
        for prompt, output in expected.items():
            assert await complete(client, prompt) == output, f"warm, {len(prompt)} tokens"
    await system.at_rest()


async def test_in_a_batch_of_sixteen(system: LocalSystem, expected: dict[tuple[int, ...], list[int]]) -> None:
    async with client_of(system) as client:
        assert len(expected) == 16
        outputs = await asyncio.gather(*(complete(client, prompt) for prompt in expected))
    assert outputs == list(expected.values())
    await system.at_rest()


async def test_a_client_that_leaves_frees_both_sides(system: LocalSystem) -> None:
    async with client_of(system) as client:
        for num_read in (0, 1, 5):
            stream = await client.completions.create(
                model="m", prompt=list(range(3, 200)), stream=True, max_tokens=300, extra_body=IDS_ONLY
            )
            for _ in range(num_read):
                await anext(stream)
            await stream.close()
            await system.at_rest()
