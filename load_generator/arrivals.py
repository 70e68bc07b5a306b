"""Arrivals that are drawn, not recorded. Pure: the random generator is an argument."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from load_generator.traces import PlannedRequest

_MAX_BLOCKS = 2**32  # of one prompt; keeps the ids of one request apart from those of the next


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and answers are, and what they share."""

    num_prompt_tokens: int = 512
    num_output_tokens: int = 64
    spread: float = 0.0
    """Standard deviation of both, as a share of the mean; normally distributed and at least one token."""
    num_shared_tokens: int = 0
    """Leading tokens that all prompts of a group have in common."""
    num_groups: int = 1
    """Among how many different shared prefixes prompts choose at random."""


def gaps(rate: float, burstiness: float, random: np.random.Generator) -> Iterator[float]:
    """Endless seconds between arrivals: gamma distributed with mean 1 / `rate` and shape `burstiness`.

    1 is a Poisson process, below 1 is burstier (a coefficient of variation of 1 / sqrt(burstiness)), infinity
    is a steady beat. The definition is that of vLLM's benchmark.
    """
    while True:
        yield 1 / rate if np.isinf(burstiness) else float(random.gamma(burstiness, 1 / (rate * burstiness)))


def drawn(
    count: int, rate: float, burstiness: float, lengths: Lengths, random: np.random.Generator
) -> list[PlannedRequest]:
    """`count` requests at a mean of `rate` per second; an infinite rate makes all due at once."""
    between = gaps(rate, burstiness, random) if np.isfinite(rate) else iter(lambda: 0.0, None)
    due_s = 0.0
    requests = []
    for index in range(count):
        requests.append(_request(index, due_s, lengths, random))
        due_s += next(between)
    return requests


def _request(index: int, due_s: float, lengths: Lengths, random: np.random.Generator) -> PlannedRequest:
    num_prompt = _length(lengths.num_prompt_tokens, lengths.spread, random)
    num_output = _length(lengths.num_output_tokens, lengths.spread, random)
    num_shared = min(lengths.num_shared_tokens, num_prompt)
    if not num_shared:
        return PlannedRequest(due_s, num_prompt, num_output)
    # One id for the shared part and ids of its own for the rest; negative ones are nobody else's.
    group = int(random.integers(lengths.num_groups))
    num_blocks = -(-num_prompt // num_shared)
    own = tuple(-(index * _MAX_BLOCKS + block + 1) for block in range(num_blocks - 1))
    return PlannedRequest(due_s, num_prompt, num_output, (group, *own), num_shared)


def _length(mean: int, spread: float, random: np.random.Generator) -> int:
    return max(1, round(random.normal(mean, spread * mean))) if spread else mean
