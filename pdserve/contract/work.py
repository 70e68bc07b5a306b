"""What a scheduler asks of the engine for one step, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.contract.ids import BlockId
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import TokenBytes, num_tokens


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What everybody must know about the model that a worker serves."""

    name: str
    architecture: str
    revision: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and output together."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens per KV block."""
    num_blocks: int
    """Rows of this worker's KV pool."""
    block_bytes: int
    """Of one block over all layers: num_layers * 2 * block_size * num_kv_heads * head_dim * itemsize."""
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    """Equal on two workers iff one can use the other's KV bytes: model, revision, dtype, rope, block
    size, adapters and protocol version. The pool's size is not part of it."""
    chunk_tokens: int
    """Prefill chunks end at multiples of this, counted from token 0."""
    deterministic: bool

    @property
    def pool_tokens(self) -> int:
        """Most tokens that this worker's KV pool can ever hold of one sequence."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How to sample the token that follows a sequence's last new token."""

    params: SamplingParams
    seed: int
    """63 bits, drawn once per request by the router."""
    position: int
    """How many tokens precede the sampled one: prompt and output. With `seed` it fixes the random draw."""
    output_index: int
    """Which output token of the request this is, from 0. Serves `min_tokens`."""
    history: TokenBytes = b""
    """All `position` tokens so far; only filled when `params.needs_history`."""
    num_prompt_tokens: int = 0
    """How many of `history` are the prompt's."""


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's part of a step: `tokens` are computed at positions [start, start + n).

    The pool already holds the sequence's KV for [0, start); the step writes [start, start + n) into
    the blocks of `block_ids`, which cover [0, start + n).
    """

    tokens: TokenBytes
    start: int
    block_ids: Sequence[BlockId]
    sample: SampleRequest | None = None
    """Sample after the last new token; None computes no logits."""
    as_decode: bool = False
    """Compute each token as its own one-token row. Decode loops set it in every step of a running sequence;
    with several tokens it replays known output exactly as one-token steps would have computed it."""

    @property
    def num_new_tokens(self) -> int:
        return num_tokens(self.tokens)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass: any mix of prefill chunks and decode tokens, without padding."""

    sequences: Sequence[SequenceStep]

    @property
    def num_new_tokens(self) -> int:
        return sum(sequence.num_new_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the model's own distribution (before temperature, penalties and
    truncation), as OpenAI and vLLM report them."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), most likely first."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled[i]` belongs to `batch.sequences[i]`; None where nothing was to be sampled."""

    sampled: Sequence[SampledToken | None]
    seconds: float
    """Wall time of the step on the engine's thread."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicts step times; fitted at start by the engine's calibration. Seconds."""

    fixed_s: float
    """Of any step."""
    per_prefill_token_s: float
    per_decode_sequence_s: float
    per_context_token_s: float = 0.0
    """Of every token of KV that a decode row reads."""

    def predict_s(self, prefill_tokens: int, decode_sequences: int, context_tokens: int = 0) -> float:
        return (
            self.fixed_s
            + self.per_prefill_token_s * prefill_tokens
            + self.per_decode_sequence_s * decode_sequences
            + self.per_context_token_s * context_tokens
        )

    def predict_batch_s(self, batch: StepBatch) -> float:
        """Of a step: tokens of `as_decode` sequences are decode rows, all others prefill."""
        decoding = [sequence for sequence in batch.sequences if sequence.as_decode]
        num_rows = sum(sequence.num_new_tokens for sequence in decoding)
        num_context_tokens = sum(sequence.start for sequence in decoding)
        return self.predict_s(batch.num_new_tokens - num_rows, num_rows, num_context_tokens)


def hung_after_s(predicted_s: float) -> float:
    """How long a step that should take `predicted_s` may take before its engine counts as hung."""
    return max(10.0, 20 * predicted_s)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """KV blocks by state; they sum to the pool's size."""

    free: int
    cached: int
    """Named, held by nobody, evictable."""
    reserved: int
    """Held for a request whose sequence does not run yet."""
    active: int
    """Held by a running sequence or a prefill."""


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Half-open range of layers."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


POOL_FILE_NAME = "pdserve-kv"
"""How the names of the memory files begin that pools lie in."""

EXPORT_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class PoolExport:
    """How a process on the same host can map a CPU KV pool: open /proc/<pid>/fd/<fd>."""

    host_id: str
    """Identifies host and mount and pid namespaces; equal iff the path above means the same file."""
    pid: int
    fd: int
    num_bytes: int
    token: str = field(default="", repr=False)
    """EXPORT_TOKEN_BYTES random bytes in hexadecimal, also found at the end of the file: a reused pid or fd
    is noticed, and nobody can name a file that is not the pool's."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A KV pool in a GPU's memory: [num_blocks, block_bytes] from `address` on."""

    address: int
    num_bytes: int
    device: int
    """The GPU's ordinal in this process."""
    host_id: str
    """As in `PoolExport`; empty where it is not known."""
