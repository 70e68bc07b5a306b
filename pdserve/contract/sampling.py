"""What a request asks of the sampler."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request's output ended."""

    STOP = "stop"
    """An end or stop token was sampled, or a stop string was found."""
    LENGTH = "length"
    """max_tokens or the model's length was reached."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits, and when the request ends.

    Bounds are checked where a request enters the system (`router`), so workers may rely on them.
    Penalties follow the definitions of OpenAI (presence, frequency: over output tokens) and of
    Keskar et al. 2019, CTRL (repetition: over prompt and output tokens), as vLLM and transformers do.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    """Until this many output tokens exist, end and stop tokens cannot be sampled."""
    temperature: float = 1.0
    """0 is greedy: the first of the largest logits."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least top_p, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit) pairs."""
    logprobs: int | None = None
    """None: no log probabilities. n >= 0: the chosen token's and those of the n most likely ones."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the request; the token is part of the output ids, not of the text."""
    ignore_eos: bool = False
    """Treat the model's end tokens as ordinary ones."""

    @property
    def needs_history(self) -> bool:
        """Whether the tokens so far change the logits."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


def finish_reason(
    params: SamplingParams, token: int, num_output_tokens: int, eos_token_ids: tuple[int, ...]
) -> FinishReason | None:
    """Why the output ends with `token` as the last of `num_output_tokens`; None when it goes on.

    The one rule that prefill and decode workers share, so that a first token that is also the last is
    recognised on both sides. `min_tokens` needs no check: before it, such tokens cannot be sampled.
    """
    if token in params.stop_token_ids or (token in eos_token_ids and not params.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output_tokens >= params.max_tokens else None
