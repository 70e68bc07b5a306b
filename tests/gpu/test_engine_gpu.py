"""The engine on a GPU: the same tokens as transformers' own, and the same bytes through the pool."""

from pathlib import Path

import pytest
import torch

from pdserve.contract.errors import ConfigError
from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import LayerRange, SequenceStep, StepBatch
from pdserve.engine.kv_pool import KvLayout, KvPool
from tests.engine_runs import generate, load_engine
from tests.reference import greedy_references, mixed_prompts
from tests.small_models import CONFIGS, VOCAB_SIZE, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NUM_OUTPUT = 12


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_tokens_equal_generate(architecture: str, tmp_path: Path) -> None:
    """The reference is computed on the CPU in float32; its best tokens lead by more than rounding."""
    model = make_model(architecture, tmp_path, seed=1 if architecture in ("llama", "qwen3") else 0)
    prompts = mixed_prompts(16, 16, 32, VOCAB_SIZE)
    expected = greedy_references(model.reference, prompts, NUM_OUTPUT)
    engine = load_engine(tmp_path, dtype="float32", device="cuda")
    assert engine.blocks.tensor.is_cuda
    assert not engine.info.deterministic
    assert dict(zip(prompts, generate(engine, prompts, NUM_OUTPUT), strict=True)) == expected


def test_bfloat16_passes_the_self_check(tmp_path: Path) -> None:
    make_model("llama", tmp_path, dtype=torch.bfloat16)
    assert load_engine(tmp_path, device="auto").blocks.tensor.dtype == torch.bfloat16


def test_blocks_read_and_written_on_the_device() -> None:
    layout = KvLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float16)
    pool = KvPool(layout, 6, torch.device("cuda"))
    pool.tensor.normal_()
    picked, layers = [BlockId(4), BlockId(1)], LayerRange(1, 3)
    payload = pool.read(picked, layers)
    expected = pool.tensor[[4, 1]][:, 1:3].contiguous().cpu().view(torch.uint8).numpy().tobytes()
    assert bytes(payload) == expected
    pool.write([BlockId(0), BlockId(5)], layers, memoryview(payload))
    assert torch.equal(pool.tensor[[0, 5]][:, 1:3], pool.tensor[[4, 1]][:, 1:3])
    assert pool.export() is None


def test_determinism_is_not_promised(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="leave deterministic unset, or use the CPU"):
        load_engine(tmp_path, device="cuda", deterministic=True)


def test_layers_are_final_when_they_are_told_of(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = load_engine(tmp_path, dtype="float32", device="cuda")
    tokens = pack_tokens(range(3, 203))
    table = [BlockId(block) for block in range(-(-200 // engine.info.block_size))]
    seen: dict[int, bytearray] = {}

    def layers_done(stop: int) -> None:
        seen[stop] = engine.blocks.read(table, LayerRange(0, stop))

    engine.step(StepBatch([SequenceStep(tokens, 0, table)]), layers_done)
    assert list(seen) == [1, 2, 3]
    assert seen == {stop: engine.blocks.read(table, LayerRange(0, stop)) for stop in seen}
