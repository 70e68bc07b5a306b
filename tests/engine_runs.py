"""Driving an engine by hand: sequences in blocks of their own, prompts in chunks, decode steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pdserve.contract.block_names import blocks_for
from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SequenceStep, StepBatch
from pdserve.engine.chunking import PromptProgress, next_chunk_stop
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings


def load_engine(folder: Path, **settings: object) -> ModelEngine:
    """An engine on one thread with a small pool."""
    defaults: dict[str, object] = {"threads": 1, "kv_memory_bytes": 16 << 20, "chunk_tokens": 32}
    return ModelEngine.load(EngineSettings(str(folder), **(defaults | settings)))  # type: ignore[arg-type]


@dataclass
class Blocks:
    """Hands out blocks from the front of the pool, never twice."""

    engine: ModelEngine
    used: int = 0

    def take(self, num_tokens: int) -> list[BlockId]:
        count = blocks_for(num_tokens, self.engine.info.block_size)
        self.used += count
        assert self.used <= self.engine.blocks.num_blocks
        return [BlockId(block) for block in range(self.used - count, self.used)]


@dataclass
class Run:
    """One sequence: `tokens` so far, of which the first `computed` have their KV in `block_ids`."""

    tokens: list[int]
    num_prompt: int
    block_ids: list[BlockId]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    def chunk(self, chunk_tokens: int) -> SequenceStep:
        """The next chunk of the prompt."""
        stop = next_chunk_stop(PromptProgress(self.computed, self.num_prompt), chunk_tokens)
        return self.part(stop, as_decode=False)

    def part(self, stop: int, as_decode: bool) -> SequenceStep:
        """Everything up to `stop` that is not computed yet."""
        start, self.computed = self.computed, stop
        return SequenceStep(pack_tokens(self.tokens[start:stop]), start, self.block_ids, as_decode=as_decode)


def logits_of(engine: ModelEngine, *steps: SequenceStep) -> list[Tensor]:
    """One engine step; the logits after every sequence's last token."""
    return list(engine.logits(StepBatch(steps), range(len(steps))))


def prefill(engine: ModelEngine, run: Run, beside: Sequence[SequenceStep] = ()) -> Tensor:
    """Compute the rest of the prompt in chunks; the logits after it."""
    logits = torch.empty(0)
    while run.computed < run.num_prompt:
        logits = logits_of(engine, run.chunk(engine.info.chunk_tokens), *beside)[0]
    return logits


def generate(engine: ModelEngine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations, all sequences together from the first step on: chunks beside decode steps."""
    blocks = Blocks(engine)
    runs = [Run(list(prompt), len(prompt), blocks.take(len(prompt) + num_tokens)) for prompt in prompts]
    while active := [run for run in runs if len(run.tokens) < run.num_prompt + num_tokens]:
        steps = [
            run.chunk(engine.info.chunk_tokens)
            if run.computed < run.num_prompt
            else run.part(len(run.tokens), as_decode=True)
            for run in active
        ]
        for run, logits in zip(active, logits_of(engine, *steps), strict=True):
            if run.computed == len(run.tokens):
                run.tokens.append(int(logits.argmax()))
    return [run.tokens[run.num_prompt :] for run in runs]


def cached_kv(engine: ModelEngine, run: Run, num_tokens: int) -> Tensor:
    """[layers, 2, num_tokens, heads, head_dim]: what the pool holds of a sequence."""
    blocks = engine.blocks.tensor[torch.tensor(run.block_ids)]
    return blocks.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, :num_tokens].clone()
