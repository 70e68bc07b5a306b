"""Where prefill chunks end and how many of them fit a step. Pure; shared by both rooms' schedulers."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.contract.work import StepCost


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """A prompt of `num_tokens` of which `num_computed` leading tokens have their KV."""

    num_computed: int
    num_tokens: int


LEAST_CHUNK_TOKENS = 64
"""One tile of attention. Shorter chunks save little: a step that reads all weights takes its time anyway."""


def chunk_tokens_within(budget_s: float, cost: StepCost, chunk_tokens: int) -> int:
    """How long chunks may be so that a step of one keeps `budget_s`.

    `chunk_tokens` halved as often as needed, but not below LEAST_CHUNK_TOKENS. Halves, so that long and short
    chunks end at the same multiples.
    """
    while cost.predict_s(chunk_tokens, 0) > budget_s and chunk_tokens >= 2 * LEAST_CHUNK_TOKENS:
        chunk_tokens //= 2
    return chunk_tokens


def next_chunk_stop(progress: PromptProgress, chunk_tokens: int) -> int:
    """Where the next chunk ends: the next multiple of `chunk_tokens` from token 0, or the prompt's end.

    Fixed multiples, wherever a cached prefix ends, cut the same prompt at the same places every time.
    """
    return min(progress.num_tokens, (progress.num_computed // chunk_tokens + 1) * chunk_tokens)


def fill_step(
    prompts: Sequence[PromptProgress], chunk_tokens: int, cost: StepCost, budget_s: float, spent_s: float
) -> list[int]:
    """How far each prompt gets in a step that has already been given work of `spent_s` seconds.

    One chunk per prompt, in order, while the predicted time stays within `budget_s`; the first prompt gets
    its chunk in any case, so that every step makes progress. Returns the stop of each leading prompt that
    takes part; the rest wait for a later step.
    """
    stops: list[int] = []
    for progress in prompts:
        stop = next_chunk_stop(progress, chunk_tokens)
        spent_s += cost.per_prefill_token_s * (stop - progress.num_computed)
        if stops and spent_s > budget_s:
            break
        stops.append(stop)
    return stops
