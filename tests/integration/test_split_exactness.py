"""Tokens of a split run equal transformers' own, through HTTP, exactly, for every architecture."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
import torch

from controller.worker import WorkerSettings
from pdserve.engine.settings import EngineSettings
from tests.local_system import LocalSystem
from tests.reference import greedy_references, mixed_prompts
from tests.small_models import VOCAB_SIZE, SmallModel, make_model

BLOCK, CHUNK, NUM_OUTPUT = 16, 32, 20
LLAMA_BLOCK_BYTES = 3 * 2 * BLOCK * 2 * 16 * 4  # layers, key and value, tokens, KV heads, head size, float32
IDS_ONLY = {"return_token_ids": True, "ignore_eos": True}

SEEDS = {"llama": 1, "qwen3": 1}
"""Seeds of the random weights for which every next token is unambiguous; 0 where not named."""
OTHER_ARCHITECTURES = (
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "gpt2",
    "mixtral",
    "qwen3_moe",
)

Expected = dict[tuple[int, ...], list[int]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(llama: SmallModel) -> Expected:
    return references(llama)


@pytest.fixture(params=["shared_memory", "grpc", "unsplit"])
async def system(request: pytest.FixtureRequest, llama: SmallModel) -> AsyncIterator[LocalSystem]:
    unsplit = request.param == "unsplit"
    transports = ("grpc",) if unsplit else (request.param,)
    async with local_system(llama.folder, transports, num_prefill=0 if unsplit else 1) as system:
        yield system
        if not unsplit:  # the transport asked for was the one used
            (moved,) = bytes_moved(system).items()
            assert moved[0] == request.param
            assert moved[1] > 0


async def test_alone_cold_and_warm(system: LocalSystem, expected: Expected) -> None:
    async with client_of(system) as client:
        await assert_exact_one_by_one(client, expected, "cold")
        await assert_exact_one_by_one(client, expected, "warm")
    await system.at_rest()


async def test_in_a_batch_of_sixteen(system: LocalSystem, expected: Expected) -> None:
    async with client_of(system) as client:
        await assert_exact_together(client, expected)
    await system.at_rest()


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
async def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    model = small_model(architecture, tmp_path)
    expected = references(model)
    async with local_system(tmp_path) as system, client_of(system) as client:
        await assert_exact_one_by_one(client, expected, "cold")
        await assert_exact_together(client, expected)
        await system.at_rest()


async def test_preemption_changes_no_token(llama: SmallModel) -> None:
    """Each sequence alone grows to most of the pool, so no two of them can run to their ends side by side."""
    num_output, pool_blocks = 190, 16
    prompts = mixed_prompts(4, BLOCK, CHUNK, VOCAB_SIZE, seed=0)[1:4]
    expected = greedy_references(llama.reference, prompts, num_output)
    async with (
        local_system(llama.folder, kv_memory_bytes=pool_blocks * LLAMA_BLOCK_BYTES) as system,
        client_of(system) as client,
    ):
        await assert_exact_together(client, expected, num_output)
        preemptions = system.workers["decode-0"].registry.get_sample_value(
            "pdserve_preemptions_total", {"pool": "decode"}
        )
        assert preemptions, "the pool is meant to be too small for the batch"
        await system.at_rest()


async def test_seeded_sampling_is_the_same_split_unsplit_alone_and_batched(llama: SmallModel) -> None:
    prompts = mixed_prompts(16, BLOCK, CHUNK, VOCAB_SIZE, seed=9)
    sampling: dict[str, object] = {
        "temperature": 0.8,
        "seed": 11,
        "top_p": 0.95,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    extra = IDS_ONLY | {"top_k": 50, "repetition_penalty": 1.1}
    outputs = []
    for num_prefill in (0, 1):
        async with local_system(llama.folder, num_prefill=num_prefill) as system, client_of(system) as client:
            alone = [await complete(client, prompt, extra, **sampling) for prompt in prompts]
            batched = await asyncio.gather(
                *(complete(client, prompt, extra, **sampling) for prompt in prompts)
            )
            outputs += [alone, batched]
    assert outputs[1:] == outputs[:1] * 3


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


def bytes_moved(system: LocalSystem) -> dict[str, float]:
    """KV bytes that the decode worker has received, by transport."""
    samples = (
        sample for metric in system.workers["decode-0"].registry.collect() for sample in metric.samples
    )
    return {s.labels["transport"]: s.value for s in samples if s.name == "pdserve_kv_transfer_bytes_total"}


def small_model(architecture: str, folder: Path) -> SmallModel:
    torch.set_num_threads(1)
    return make_model(architecture, folder, seed=SEEDS.get(architecture, 0))


def references(model: SmallModel) -> Expected:
    return greedy_references(model.reference, mixed_prompts(16, BLOCK, CHUNK, VOCAB_SIZE), NUM_OUTPUT)


@asynccontextmanager
async def local_system(
    folder: Path,
    transports: Sequence[str] = ("shared_memory", "grpc"),
    num_prefill: int = 1,
    kv_memory_bytes: int = 4 << 20,
) -> AsyncIterator[LocalSystem]:
    engine = EngineSettings(
        str(folder),
        served_name="m",
        dtype="float32",
        threads=1,
        kv_memory_bytes=kv_memory_bytes,
        chunk_tokens=CHUNK,
    )
    settings = WorkerSettings(transports=tuple(transports))
    async with LocalSystem(engine, num_prefill, worker_settings=settings) as system:
        yield system


def client_of(system: LocalSystem) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


async def complete(
    client: openai.AsyncOpenAI,
    prompt: tuple[int, ...],
    extra: dict[str, object] = IDS_ONLY,
    num_output: int = NUM_OUTPUT,
    **fields: object,
) -> list[int]:
    """The output's token ids, streamed."""
    stream = await client.completions.create(
        model="m",
        prompt=list(prompt),
        stream=True,
        max_tokens=num_output,
        extra_body=extra,
        **({"temperature": 0} | fields),  # type: ignore[call-overload]
    )
    tokens: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            tokens += choice.model_extra.get("token_ids") or []
    return tokens


async def assert_exact_one_by_one(client: openai.AsyncOpenAI, expected: Expected, caches: str) -> None:
    for prompt, output in expected.items():
        assert await complete(client, prompt) == output, f"{caches} caches, {len(prompt)} tokens"


async def assert_exact_together(
    client: openai.AsyncOpenAI, expected: Expected, num_output: int = NUM_OUTPUT
) -> None:
    outputs = await asyncio.gather(*(complete(client, prompt, num_output=num_output) for prompt in expected))
    assert outputs == list(expected.values())
