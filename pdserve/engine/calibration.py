"""How long steps take on this machine, measured at load in a second or so."""

import time
from collections.abc import Sequence
from statistics import median

from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import ModelInfo, SequenceStep, StepBatch, StepCost
from pdserve.engine.self_check import Logits

_BATCH = 8
_REPEATS = 3
_CONTEXT_TOKENS = 512
_PROMPT_TOKENS = (16, 64, 256)
_ENOUGH_S = 0.1
"""A prompt that takes this long is long enough to measure with."""


def calibrate(logits: Logits, info: ModelInfo) -> StepCost:
    """Fit a StepCost to a few steps. Overwrites the pool's blocks; nothing may be cached yet."""
    probe = _Probe(logits, info)
    probe.decode_s(1, 1)
    one = probe.decode_s(1, 1)
    many = probe.decode_s(_BATCH, 1)
    per_sequence_s = max((many - one) / (_BATCH - 1), 0.0)
    fixed_s = max(one - per_sequence_s, 0.0)
    context = min(_CONTEXT_TOKENS, info.max_model_len - 1, info.num_blocks * info.block_size - 1)
    long = probe.decode_s(_BATCH, context)
    return StepCost(
        fixed_s=fixed_s,
        per_prefill_token_s=_per_prefill_token(probe, info, fixed_s),
        per_decode_sequence_s=per_sequence_s,
        per_context_token_s=max((long - many) / (_BATCH * context), 0.0),
    )


def _per_prefill_token(probe: "_Probe", info: ModelInfo, fixed_s: float) -> float:
    """From the longest prompt worth waiting for: short ones are dominated by reading the weights."""
    longest = min(info.chunk_tokens, info.max_model_len - 1, info.num_blocks * info.block_size)
    seconds, length = 0.0, 1
    for tokens in _PROMPT_TOKENS:
        length = min(tokens, longest)
        seconds = probe.prefill_s(length)
        if seconds > _ENOUGH_S:
            break
    # A prompt of a few tokens may take no longer than a decode step; its tokens are not free for that.
    return max(seconds - fixed_s, 0.1 * seconds) / length


class _Probe:
    """Times steps over arbitrary tokens and whatever lies in the pool."""

    def __init__(self, logits: Logits, info: ModelInfo) -> None:
        self._logits = logits
        self._info = info

    def decode_s(self, sequences: int, context: int) -> float:
        """Every sequence reads its own blocks, as far as the pool has that many."""
        needed = context // self._info.block_size + 1
        tables = [self._table(index * needed, needed) for index in range(sequences)]
        steps = [SequenceStep(pack_tokens([1]), context, table, as_decode=True) for table in tables]
        return self._median_s(StepBatch(steps), list(range(sequences)))

    def prefill_s(self, tokens: int) -> float:
        table = self._table(0, -(-tokens // self._info.block_size))
        return self._median_s(StepBatch([SequenceStep(pack_tokens([1] * tokens), 0, table)]), [0])

    def _table(self, first: int, count: int) -> list[BlockId]:
        return [BlockId((first + index) % self._info.num_blocks) for index in range(count)]

    def _median_s(self, batch: StepBatch, wanted: Sequence[int]) -> float:
        seconds = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            self._logits(batch, wanted)
            seconds.append(time.perf_counter() - started)
        return median(seconds)
