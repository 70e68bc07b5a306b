"""The engine's greedy tokens equal transformers' own for every architecture, alone and in mixed batches."""

from pathlib import Path

import pytest
import torch

from tests.engine_runs import generate, load_engine
from tests.reference import greedy_references, mixed_prompts
from tests.small_models import CONFIGS, VOCAB_SIZE, make_model

BLOCK, CHUNK, NUM_OUTPUT = 16, 32, 12
SEEDS = {"llama": 1, "qwen3": 1}
"""Seeds of the random weights for which every next token is unambiguous; 0 where not named."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_tokens_equal_generate(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, tmp_path, seed=SEEDS.get(architecture, 0))
    prompts = mixed_prompts(16, BLOCK, CHUNK, VOCAB_SIZE)
    expected = greedy_references(model.reference, prompts, NUM_OUTPUT)
    engine = load_engine(tmp_path, dtype="float32", block_size=BLOCK, chunk_tokens=CHUNK)

    together = generate(engine, prompts, NUM_OUTPUT)
    assert dict(zip(prompts, together, strict=True)) == expected
    for prompt in prompts:
        assert generate(engine, [prompt], NUM_OUTPUT) == [expected[prompt]]
    assert len({tuple(output) for output in expected.values()}) > 1, "the prompts must matter"


def test_windows_inside_and_beyond_tiles(tmp_path: Path) -> None:
    """Windows that end inside a tile, at its edge and several tiles back."""
    for window in (3, 64, 100, 200):
        folder = tmp_path / str(window)
        model = make_model("mistral", folder, seed=2, sliding_window=window)
        prompts = mixed_prompts(10, 16, 128, VOCAB_SIZE, seed=window)
        prompts = [prompt for prompt in prompts if len(prompt) < 500]
        expected = greedy_references(model.reference, prompts, 4)
        engine = load_engine(folder, dtype="float32", chunk_tokens=128)
        assert dict(zip(prompts, generate(engine, prompts, 4), strict=True)) == expected


@pytest.mark.parametrize("block_size", [1, 24, 256])
def test_block_sizes_that_fit_no_tile(block_size: int, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, seed=1)
    prompts = mixed_prompts(10, block_size, 48, VOCAB_SIZE)
    prompts = [prompt for prompt in prompts if len(prompt) < 450]
    expected = greedy_references(model.reference, prompts, 4)
    engine = load_engine(
        tmp_path,
        dtype="float32",
        block_size=block_size,
        chunk_tokens=2 * block_size,
        kv_memory_bytes=32 << 20,
    )
    assert dict(zip(prompts, generate(engine, prompts, 4), strict=True)) == expected
