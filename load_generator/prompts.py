"""Prompts for planned requests. Pure: equal prefix ids and seeds make equal tokens, in any order."""

import re
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from load_generator.traces import PlannedRequest


class PromptForm(StrEnum):
    TOKENS = "tokens"
    """Token ids to /v1/completions, exact in length and prefix. pdserve, vLLM and SGLang take them."""
    TEXT = "text"
    """Words to /v1/completions, about one token each."""
    CHAT = "chat"
    """The same words as one user message to /v1/chat/completions."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which token ids prompts are made of: the half-open range [first, stop)."""

    first: int = 1000
    stop: int = 20000

    @classmethod
    def within(cls, size: int) -> "Vocabulary":
        """Of a model with `size` tokens: without the first eighth, where special tokens and bytes are."""
        return cls(size // 8, size)


_WORDS = re.findall(
    r"\w+",
    """
    time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work number night point home water
    room mother area money story fact month lot right study book eye job word business issue side kind head
    house service friend father power hour game line end member law car city name team minute idea kid body
    """,
)


class Prompts:
    """Makes each request's prompt when it is asked for."""

    def __init__(self, form: PromptForm, vocabulary: Vocabulary, seed: int) -> None:
        self.form = form
        self._vocabulary = vocabulary
        self._seed = seed

    def make(self, index: int, request: PlannedRequest) -> list[int] | str:
        """Token ids, or a text of as many words. `index` keeps prompts apart that share nothing."""
        numbers = self._numbers(index, request)
        if self.form is PromptForm.TOKENS:
            width = self._vocabulary.stop - self._vocabulary.first
            tokens: list[int] = (self._vocabulary.first + numbers % width).tolist()
            return tokens
        return " ".join(_WORDS[number] for number in (numbers % len(_WORDS)).tolist())

    def _numbers(self, index: int, request: PlannedRequest) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """One random number per token, the same for the same id of a block."""
        if not request.prefix_ids:
            return self._draw((1, index), request.num_prompt_tokens)
        blocks = [self._draw((0, block_id), request.block_tokens) for block_id in request.prefix_ids]
        return np.concatenate(blocks)[: request.num_prompt_tokens]

    def _draw(self, key: tuple[int, int], count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        kind, number = key
        sign = int(number < 0)
        generator = np.random.Generator(np.random.PCG64([self._seed, 2 * kind + sign, abs(number)]))
        return generator.integers(0, 2**31, count)
