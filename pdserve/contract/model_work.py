"""What a model's arithmetic asks of a device, step by step, and the most that a device gives: utilisation is
the one over the other. Pure.

It counts what no implementation can do without: multiplications with weights and attention, each weight read
once a step, and the KV of each token once a step by every sequence that looks at it. So a step that computes
or reads more than it has to shows as lower utilisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.contract.work import StepBatch


@dataclass(frozen=True, slots=True)
class StepWork:
    """Of one step."""

    num_tokens: int
    """New ones."""
    flops: float
    """A multiplication and an addition count as two."""
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of all mixture layers together; none: `count` 0."""

    count: int = 0
    """In each layer."""
    per_token: int = 0
    """How many of them a token is sent to."""
    num_weights: float = 0.0

    def share_used(self, num_tokens: int) -> float:
        """Of the weights, that a step of so many tokens reads when each expert is equally likely."""
        return 1 - (1 - self.per_token / self.count) ** num_tokens if self.count else 0.0

    @property
    def num_weights_per_token(self) -> float:
        return self.num_weights * self.per_token / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a step takes, from the shapes of the model."""

    num_weights: float
    """That every token is multiplied with: all but embeddings, experts, vectors and the model's head."""
    num_head_weights: float
    """Of the language-modelling head, which only sampled rows are multiplied with."""
    weight_bytes: int
    """Of one weight."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[tuple[int | None, int], ...]
    """How many layers see how many of the last tokens; None: all."""
    experts: Experts = Experts()

    def of(self, batch: StepBatch) -> StepWork:
        """flops = 2 * (weights * tokens + head weights * sampled rows)
        + 4 * layers * heads * head dim * (pairs of a new token and one that it sees);
        bytes = weight bytes * (weights + 2 * layers * KV heads * head dim * (tokens whose KV is read or
        written)). KV is taken to be as wide as weights."""
        parts = [(sequence.start, sequence.num_new_tokens) for sequence in batch.sequences]
        num_tokens = sum([num_new for _, num_new in parts])
        num_sampled = len([None for sequence in batch.sequences if sequence.sample is not None])
        weights_per_token = self.num_weights + self.experts.num_weights_per_token
        flops = 2 * (weights_per_token * num_tokens + self.num_head_weights * num_sampled)
        num_read = self.num_weights + self.experts.num_weights * self.experts.share_used(num_tokens)
        num_read += self.num_head_weights * (num_sampled > 0)
        for window, num_layers in self.windows:
            flops += 4 * num_layers * self.num_heads * self.head_dim * _num_pairs(parts, window)
            num_read += 2 * num_layers * self.num_kv_heads * self.head_dim * _num_kv(parts, window)
        return StepWork(num_tokens, flops, num_read * self.weight_bytes)


@dataclass(frozen=True, slots=True)
class DevicePeak:
    """The most that a device gives."""

    flops_per_s: float
    """In the model's dtype, dense."""
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a device."""

    work: ModelWork
    peak: DevicePeak


Parts = Sequence[tuple[int, int]]
"""Of sequences: where the new tokens start, and how many they are."""


def _num_pairs(parts: Parts, window: int | None) -> int:
    """Of a new token and one that it sees, itself included."""
    if window is None:
        return sum([num_new * start + num_new * (num_new + 1) // 2 for start, num_new in parts])
    return sum([_num_seen(start + num_new, window) - _num_seen(start, window) for start, num_new in parts])


def _num_seen(length: int, window: int) -> int:
    """How many tokens all tokens of a sequence see together: 1 + 2 + 3 + ..., none more than `window`."""
    growing = min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def _num_kv(parts: Parts, window: int | None) -> int:
    """Tokens whose KV is read, because a new one sees them, or written, because they are new."""
    if window is None:
        return sum([start + num_new for start, num_new in parts])
    return sum([min(start, window - 1) + num_new for start, num_new in parts])
