"""Requests that run while something goes wrong, and what came of each, through the official client."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import httpx
import openai

VOCAB = range(3, 300)
TIMEOUT_S = 60.0
"""How long a client waits; a request that takes longer is lost."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    longest_pause_s: float = 0.0
    """Between two events, or before the first."""
    error: str = ""


def questions(
    count: int, seed: int, prompt: tuple[int, int] = (30, 220), output: tuple[int, int] = (20, 80)
) -> list[Question]:
    """Prompts that nobody has seen; every other is sampled. `prompt` and `output` are ranges of lengths in
    tokens."""
    random = Random(seed)
    return [
        Question(
            tuple(random.choices(VOCAB, k=random.randint(*prompt))),
            random.randint(*output),
            temperature=0.0 if index % 2 else 0.8,
            seed=random.getrandbits(31),
        )
        for index in range(count)
    ]


class Client:
    """Of one system, at `url`. Its own retries are off: what it sees is what there is."""

    def __init__(self, url: str, model: str) -> None:
        self.begun = asyncio.Event()
        """An answer has begun, or ended before it could."""
        self._model = model
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._openai.close()

    async def ask_all(self, asked: Sequence[Question]) -> list[Answer]:
        """All at once."""
        return list(await asyncio.gather(*[self.ask(question) for question in asked]))

    async def ask(self, question: Question) -> Answer:
        """One stream, read to its end."""
        answer = Answer()
        await self.read(question, answer)
        return answer

    async def read(
        self, question: Question, answer: Answer, deadline_s: float | None = None, pause_s: float = 0.0
    ) -> None:
        """Read into `answer`, so that a reader that is cancelled has told what it saw. `pause_s`: between two
        events, as a slow client."""
        deadline = {} if deadline_s is None else {"X-Request-Timeout-Ms": str(int(1000 * deadline_s))}
        seen_at = time.monotonic()
        try:
            stream = await self._openai.completions.create(
                model=self._model,
                prompt=list(question.prompt),
                max_tokens=question.max_tokens,
                temperature=question.temperature,
                seed=question.seed,
                stream=True,
                extra_headers=deadline,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            async with stream:
                async for chunk in stream:
                    now = time.monotonic()
                    answer.longest_pause_s = max(answer.longest_pause_s, now - seen_at)
                    seen_at = now
                    answer.tokens += (chunk.choices[0].model_extra or {}).get("token_ids", [])
                    self.begun.set()
                    if pause_s:
                        await asyncio.sleep(pause_s)
        except (openai.OpenAIError, httpx.HTTPError) as error:  # the latter while a stream is read
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            self.begun.set()


def num_lost(asked: Sequence[Question], answers: Sequence[Answer]) -> int:
    """Requests that ended with an error or too few tokens."""
    return sum(
        bool(answer.error) or len(answer.tokens) < question.max_tokens
        for question, answer in zip(asked, answers, strict=True)
    )


def num_wrong(answers: Sequence[Answer], expected: Sequence[Answer]) -> int:
    """Tokens that differ from those of the run without faults, those of lost requests included as far as they
    came; tokens too many are wrong."""
    return sum(
        sum(one != other for one, other in zip(answer.tokens, right.tokens, strict=False))
        + max(0, len(answer.tokens) - len(right.tokens))
        for answer, right in zip(answers, expected, strict=True)
    )
