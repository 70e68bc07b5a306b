"""The same bits, whatever runs beside a sequence and however its work is cut."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from pdserve.contract.ids import BlockId
from pdserve.contract.work import SequenceStep
from pdserve.engine import attention_plan
from pdserve.engine.engine import ModelEngine
from tests.engine_runs import Blocks, Run, cached_kv, load_engine, logits_of, prefill
from tests.small_models import CONFIGS, VOCAB_SIZE, make_model

NUM_PROMPT, NUM_DECODED = 150, 12
PROMISED = [name for name in CONFIGS if name != "gpt_oss"]
"""Experts with biases are left to the model's own code, whose products feel their number of rows."""
WIDE = {
    "hidden_size": 448,
    "intermediate_size": 608,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 2,
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", PROMISED)
def test_bits_do_not_depend_on_the_cut(architecture: str, dtype: str, tmp_path: Path) -> None:
    make_model(architecture, tmp_path, dtype=getattr(torch, dtype))
    engine = load_engine(tmp_path, dtype=dtype, chunk_tokens=64)
    assert engine.info.deterministic
    assert_invariant(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_layers_on_several_threads(threads: int, dtype: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path, dtype=getattr(torch, dtype), **WIDE)
    assert_invariant(load_engine(tmp_path, dtype=dtype, chunk_tokens=64, threads=threads))


def test_a_prompt_whose_keys_are_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As prompts beyond 4,096 tokens are, which would take minutes here: the same bits however it is cut, and
    what the whole gives up to rounding."""
    make_model("llama", tmp_path)
    engine = load_engine(tmp_path, chunk_tokens=64)
    tokens = list(range(3, 303))
    run = Run(tokens, len(tokens), list(map(BlockId, range(20))))
    whole = prefill(engine, run)
    monkeypatch.setattr(attention_plan, "PREFILL_PART_TOKENS", attention_plan.PREFILL_TILE_TOKENS)
    run.computed = 0
    torch.testing.assert_close(prefill(engine, run), whole, rtol=1e-4, atol=1e-4)
    assert_invariant(engine)


def assert_invariant(engine: ModelEngine) -> None:
    """One sequence in every way there is; its KV and logits are compared bit for bit with the plainest."""
    random = Random(3)
    tokens = [random.randrange(3, VOCAB_SIZE) for _ in range(NUM_PROMPT + NUM_DECODED)]
    blocks = Blocks(engine)
    plain = Run(tokens, NUM_PROMPT, blocks.take(len(tokens)))
    after_prompt = prefill(engine, plain)
    decoded = [decode(engine, plain) for _ in range(NUM_DECODED)]
    expected = cached_kv(engine, plain, len(tokens))

    warm = Run(tokens, NUM_PROMPT, blocks.take(len(tokens)))
    for cached_blocks in (1, 3, 5, 9):  # inside chunks and tiles
        source, target = plain.block_ids[:cached_blocks], warm.block_ids[:cached_blocks]
        engine.blocks.tensor[torch.tensor(target)] = engine.blocks.tensor[torch.tensor(source)]
        warm.computed = cached_blocks * engine.info.block_size
        assert torch.equal(prefill(engine, warm), after_prompt)
        assert torch.equal(cached_kv(engine, warm, NUM_PROMPT), expected[:, :, :NUM_PROMPT])

    replayed = logits_of(engine, warm.part(len(tokens), as_decode=True))[0]
    assert torch.equal(replayed, decoded[-1])
    assert torch.equal(cached_kv(engine, warm, len(tokens)), expected)

    crowd = Crowd(engine, blocks, random)
    crowded = Run(tokens, NUM_PROMPT, blocks.take(len(tokens)))
    assert torch.equal(prefill(engine, crowded, crowd.steps()), after_prompt)
    for row in decoded:
        step = crowded.part(crowded.computed + 1, as_decode=True)
        others = crowd.steps()
        assert torch.equal(logits_of(engine, *others[:7], step, *others[7:])[7], row)
    assert torch.equal(cached_kv(engine, crowded, len(tokens)), expected)


def decode(engine: ModelEngine, run: Run) -> Tensor:
    return logits_of(engine, run.part(run.computed + 1, as_decode=True))[0]


class Crowd:
    """Fifteen other sequences, some decoding, some in their prompt, all of other lengths."""

    def __init__(self, engine: ModelEngine, blocks: Blocks, random: Random) -> None:
        self._runs = []
        for index, length in enumerate((1, 5, 16, 33, 130, 200, 40, 64, 90, 11, 31, 48, 128, 3, 17)):
            tokens = [random.randrange(3, VOCAB_SIZE) for _ in range(length + 40)]
            run = Run(tokens, length if index % 2 else length + 40, blocks.take(length + 40))
            if index % 2:
                prefill(engine, run)
            self._runs.append(run)

    def steps(self) -> list[SequenceStep]:
        """One more token of each that decodes, the first chunk again of the others."""
        steps = []
        for run in self._runs:
            if run.num_prompt == len(run.tokens):
                run.computed = 0
                steps.append(run.chunk(32))
            else:
                steps.append(run.part(min(run.computed + 1, len(run.tokens)), as_decode=True))
        return steps
