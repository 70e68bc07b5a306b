"""Tokens of a split run equal transformers' own, through HTTP, exactly, for every architecture."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
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
NUM_UNLIKE, NUM_LIKE = 9, 7
"""Of sixteen prompts the first share nothing; the others begin with two chunks of the last of those."""
LLAMA_BLOCK_BYTES = 3 * 2 * BLOCK * 2 * 16 * 4  # layers, key and value, tokens, KV heads, head size, float32
CROWD, CROWD_OUTPUT, CROWDED_BLOCKS = mixed_prompts(4, BLOCK, CHUNK, VOCAB_SIZE, seed=0)[1:4], 190, 16
"""Each of these sequences alone grows to most of a crowded pool, so no two can end side by side."""

Fields = dict[str, object]
IDS_ONLY: Fields = {"temperature": 0, "return_token_ids": True, "ignore_eos": True}
SEEDED: Fields = IDS_ONLY | {
    "temperature": 0.8,
    "seed": 11,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}

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
        used = {name for name in ("shared_memory", "grpc") if bytes_moved(system, name)}
        assert used == {request.param} - {"unsplit"}


async def test_alone_cold_and_warm(system: LocalSystem, expected: Expected) -> None:
    async with client_of(system) as client:
        await assert_exact_one_by_one(client, expected, "cold")
        await assert_exact_one_by_one(client, expected, "warm")
    await system.at_rest()


async def test_in_a_batch_of_sixteen_cold_and_warm(system: LocalSystem, expected: Expected) -> None:
    async with client_of(system) as client:
        await assert_exact_together(client, expected)
        await assert_exact_together(client, expected)
    await system.at_rest()


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
@pytest.mark.parametrize(("warm", "cold"), [("prefill-0", "decode-0"), ("decode-0", "prefill-0")])
async def test_alone_with_a_cache_that_is_warm_on_one_side_only(
    transport: str, warm: str, cold: str, llama: SmallModel, expected: Expected
) -> None:
    """The other side's worker is replaced. Prompts that share no prefix are then found whole at one side and
    not at all at the other, and what the decode worker holds does not travel again."""
    unlike = {prompt: expected[prompt] for prompt in list(expected)[:NUM_UNLIKE]}
    async with local_system(llama.folder, (transport,)) as system, client_of(system) as client:
        await assert_exact_one_by_one(client, unlike, "cold")
        num_moved = bytes_moved(system, transport)
        await system.replace_worker(cold)
        before = prefix_hits(system, warm)
        await assert_exact_one_by_one(client, unlike, f"{warm} warm")
        assert prefix_hits(system, warm) - before == num_findable(unlike)
        assert prefix_hits(system, cold) == 0
        if warm == "decode-0":
            held_bytes = num_findable(unlike) // BLOCK * LLAMA_BLOCK_BYTES
            assert bytes_moved(system, transport) == num_moved + (num_moved - held_bytes)
        else:
            assert bytes_moved(system, transport) == num_moved
        await system.at_rest()


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
async def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    """Alone and together, with both caches cold, both warm, and one of each."""
    model = small_model(architecture, tmp_path)
    expected = references(model)
    async with local_system(tmp_path) as system, client_of(system) as client:
        await assert_exact_one_by_one(client, expected, "cold")
        await assert_exact_one_by_one(client, expected, "warm")
        await assert_exact_together(client, expected)
        for warm, cold in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
            await system.replace_worker(cold)
            before = prefix_hits(system, warm)
            await assert_exact_together(client, expected)
            assert prefix_hits(system, warm) - before == num_findable(expected)
            assert prefix_hits(system, cold) <= NUM_LIKE * 2 * CHUNK  # what the prompts themselves share
        await system.replace_worker("decode-0")
        await system.replace_worker("prefill-0")
        await assert_exact_together(client, expected)
        await system.at_rest()


async def test_preemption_changes_no_token(llama: SmallModel) -> None:
    expected = greedy_references(llama.reference, CROWD, CROWD_OUTPUT)
    async with crowded_system(llama) as system, client_of(system) as client:
        await assert_exact_together(client, expected, CROWD_OUTPUT)


async def test_preemption_changes_no_token_of_seeded_sampling(llama: SmallModel) -> None:
    async with local_system(llama.folder, num_prefill=0) as system, client_of(system) as client:
        alone = [await complete(client, prompt, SEEDED, CROWD_OUTPUT) for prompt in CROWD]
    async with crowded_system(llama) as system, client_of(system) as client:
        assert await complete_together(client, CROWD, SEEDED, CROWD_OUTPUT) == alone


async def test_seeded_sampling_is_the_same_split_unsplit_alone_and_batched(llama: SmallModel) -> None:
    prompts = mixed_prompts(16, BLOCK, CHUNK, VOCAB_SIZE, seed=9)
    outputs = []
    for num_prefill in (0, 1):
        async with local_system(llama.folder, num_prefill=num_prefill) as system, client_of(system) as client:
            outputs.append([await complete(client, prompt, SEEDED) for prompt in prompts])
            outputs.append(await complete_together(client, prompts, SEEDED))
    assert outputs[1:] == outputs[:1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
async def test_half_precision_is_the_same_split_unsplit_alone_and_batched(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """In the checkpoint's own dtype, whose rounding leaves no reference but the single process."""
    make_model("llama", tmp_path, seed=SEEDS["llama"], dtype=dtype)
    prompts = mixed_prompts(NUM_UNLIKE, BLOCK, CHUNK, VOCAB_SIZE, seed=3)
    outputs: dict[int, list[list[list[int]]]] = {0: [], 1: []}
    for num_prefill, found in outputs.items():
        async with (
            local_system(tmp_path, num_prefill=num_prefill, dtype="auto") as system,
            client_of(system) as client,
        ):
            info = system.router.fleet.model_info()
            assert info is not None
            assert f"torch.{info.dtype}" == str(dtype)
            for fields in (IDS_ONLY, SEEDED):
                found.append([await complete(client, prompt, fields) for prompt in prompts])
                assert await complete_together(client, prompts, fields) == found[-1]
    assert outputs[0] == outputs[1]


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


def prefix_hits(system: LocalSystem, name: str) -> float:
    """Prompt tokens that a worker has found in its prefix cache since it was started."""
    return system.metric(name, "prefix_hit_tokens_total")


def num_findable(prompts: Iterable[tuple[int, ...]]) -> int:
    """Tokens of prompts that a cache can hold: whole blocks, and one token is always left to compute."""
    return sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


def bytes_moved(system: LocalSystem, transport: str) -> float:
    """KV bytes that the decode worker has received since it was started."""
    return system.metric("decode-0", "kv_transfer_bytes_total", transport=transport)


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
    dtype: str = "float32",
) -> AsyncIterator[LocalSystem]:
    engine = EngineSettings(
        str(folder),
        served_name="m",
        dtype=dtype,
        threads=1,
        kv_memory_bytes=kv_memory_bytes,
        chunk_tokens=CHUNK,
    )
    settings = WorkerSettings(transports=tuple(transports))
    async with LocalSystem(engine, num_prefill, worker_settings=settings) as system:
        yield system


@asynccontextmanager
async def crowded_system(llama: SmallModel) -> AsyncIterator[LocalSystem]:
    """Its pools hold CROWDED_BLOCKS; whoever uses it makes it preempt."""
    kv_memory_bytes = CROWDED_BLOCKS * LLAMA_BLOCK_BYTES
    async with local_system(llama.folder, kv_memory_bytes=kv_memory_bytes) as system:
        yield system
        assert system.metric("decode-0", "preemptions_total"), "the pool is meant to be too small"
        await system.at_rest()


def client_of(system: LocalSystem) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


async def complete(
    client: openai.AsyncOpenAI,
    prompt: tuple[int, ...],
    fields: Fields = IDS_ONLY,
    num_output: int = NUM_OUTPUT,
) -> list[int]:
    """The output's token ids, streamed."""
    stream = await client.completions.create(
        model="m", prompt=list(prompt), stream=True, max_tokens=num_output, extra_body=fields
    )
    tokens: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            tokens += choice.model_extra.get("token_ids") or []
    return tokens


async def complete_together(
    client: openai.AsyncOpenAI,
    prompts: Iterable[tuple[int, ...]],
    fields: Fields = IDS_ONLY,
    num_output: int = NUM_OUTPUT,
) -> list[list[int]]:
    return await asyncio.gather(*(complete(client, prompt, fields, num_output) for prompt in prompts))


async def assert_exact_one_by_one(client: openai.AsyncOpenAI, expected: Expected, caches: str) -> None:
    for prompt, output in expected.items():
        assert await complete(client, prompt) == output, f"{caches} caches, {len(prompt)} tokens"


async def assert_exact_together(
    client: openai.AsyncOpenAI, expected: Expected, num_output: int = NUM_OUTPUT
) -> None:
    outputs = await complete_together(client, expected, num_output=num_output)
    assert outputs == list(expected.values())
