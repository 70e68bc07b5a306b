"""Proof, at load, that the engine computes what the model itself computes.

The model's own eager forward pass is the reference; the engine must agree with it in chunks, across blocks
and in decode steps. The same run shows whether results are bit for bit independent of how the work is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdserve.contract.errors import ModelUnsupported
from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SequenceStep, StepBatch

NUM_TOKENS = 112
_CHUNK_STOPS = (41, 96)
"""The prompt is cut inside a block and inside a tile, and the rest are decode steps."""
_BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Allowed error of a logit, in standard deviations of the logits at its position (root mean square)."""

Logits = Callable[[StepBatch, Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Reference:
    """Tokens and the model's own logits after each of them: [tokens, vocab], in the load dtype."""

    tokens: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class CheckResult:
    error: float
    """Median over positions (float32: largest) of the error as `_BOUNDS` counts it."""
    invariant: bool
    """Whether cutting the same tokens another way gave the same bits."""


@torch.inference_mode()
def make_reference(model: nn.Module, vocab_size: int, max_model_len: int) -> Reference:
    """Run the model as it was loaded, with eager attention, over fixed arbitrary tokens."""
    count = min(NUM_TOKENS, max_model_len)
    # Multiplying by a large prime scatters over the vocabulary without repeating early.
    tokens = tuple((7919 * (index + 1)) % vocab_size for index in range(count))
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    output = model(input_ids=ids, position_ids=torch.arange(count, device=device)[None], use_cache=False)
    return Reference(tokens, output.logits[0])


def check(reference: Reference, logits: Logits, block_size: int) -> CheckResult:
    """Compare the engine with the reference; uses the first blocks of the pool."""
    run = _Run(reference.tokens, logits, block_size)
    stops = [stop for stop in _CHUNK_STOPS if stop < len(reference.tokens)]
    chunked = [run.chunk(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    first = stops[-1] if stops else 0
    decoded = [run.decode(start, start + 1) for start in range(first, len(reference.tokens))]
    positions = [stop - 1 for stop in stops] + list(range(first, len(reference.tokens)))
    errors = _errors(torch.stack(chunked + decoded), reference.logits[positions])
    exact = reference.logits.dtype == torch.float32
    again = [run.chunk(0, stops[-1]), run.decode(first, len(reference.tokens))] if stops else []
    expected = [chunked[-1], decoded[-1]] if stops else []
    return CheckResult(
        error=float(errors.max() if exact else errors.median()),
        invariant=all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)),
    )


def require_equal(name: str, kind: str, dtype: torch.dtype, result: CheckResult) -> None:
    """Raises ModelUnsupported when the engine does not compute what the model computes."""
    bound = _BOUNDS[dtype]
    if not result.error <= bound:
        raise ModelUnsupported(
            f"model {name!r} ({kind}) is not supported: the engine's logits differ from the model's own by "
            f"{result.error:.2g} standard deviations (at most {bound:g} in {dtype}), so it "
            "needs something that pdserve does not have"
        )


class _Run:
    """Computes the tokens of one sequence in the first blocks of the pool."""

    def __init__(self, tokens: Sequence[int], logits: Logits, block_size: int) -> None:
        self._tokens = tokens
        self._logits = logits
        self._block_ids = [BlockId(block) for block in range(-(-len(tokens) // block_size))]

    def chunk(self, start: int, stop: int) -> Tensor:
        return self._step(start, stop, as_decode=False)

    def decode(self, start: int, stop: int) -> Tensor:
        return self._step(start, stop, as_decode=True)

    def _step(self, start: int, stop: int, as_decode: bool) -> Tensor:
        tokens = pack_tokens(self._tokens[start:stop])
        sequence = SequenceStep(tokens, start, self._block_ids, as_decode=as_decode)
        return self._logits(StepBatch([sequence]), [0])[0]


def _errors(got: Tensor, expected: Tensor) -> Tensor:
    """Root mean square error in standard deviations of the expected logits, per position."""
    difference = (got.float() - expected.float()).square().mean(dim=-1).sqrt()
    return difference / expected.float().std(dim=-1).clamp_min(1e-12)
