"""Whole answers of the OpenAI APIs, and the usage that both kinds of answer end with."""

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Any

from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import num_tokens, unpack_tokens
from router.choices import ChoicePiece
from router.intake import ChoiceJob, Job
from router.openai_logprobs import chat_logprobs, completion_logprobs, joined_completion_logprobs
from router.report_json import timings_json
from router.text import TextModel


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every part of an answer repeats."""

    answer_id: str
    created: int
    """Unix time in seconds."""
    model: str


class Usage:
    """Counts the tokens of one answer."""

    def __init__(self, job: Job):
        self.num_prompt_tokens = job.num_prompt_tokens
        self.num_output_tokens = 0
        self._cached: dict[int, int] = {}  # prompt's number -> its tokens found in a cache
        self._n = len(job.choices) // len(job.prompts)

    def add(self, piece: ChoicePiece) -> None:
        self.num_output_tokens += num_tokens(piece.tokens)
        if piece.timings is not None:
            number = piece.index // self._n
            self._cached[number] = max(self._cached.get(number, 0), _cached_tokens(piece.timings))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in a cache; of several choices of a prompt the luckiest counts."""
        return sum(self._cached.values())

    def as_json(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


async def completion_answer(
    pieces: AsyncIterable[ChoicePiece], job: Job, head: AnswerHead, text_model: TextModel
) -> dict[str, Any]:
    """The body of a /v1/completions answer."""
    usage, choices = await _gather(pieces, job)
    listed = [_completion_choice(whole, job, text_model) for whole in choices]
    return _body("text_completion", head, listed, usage)


async def chat_answer(
    pieces: AsyncIterable[ChoicePiece], job: Job, head: AnswerHead, text_model: TextModel
) -> dict[str, Any]:
    """The body of a /v1/chat/completions answer."""
    usage, choices = await _gather(pieces, job)
    listed = [_chat_choice(whole, job, text_model) for whole in choices]
    body = _body("chat.completion", head, listed, usage)
    if job.return_token_ids:
        body["prompt_token_ids"] = unpack_tokens(job.prompts[0].tokens)
    return body


def echoed_text(choice: ChoiceJob, text_model: TextModel) -> str:
    """The prompt as an answer with `echo` starts: as it was sent, or the text of its tokens."""
    prompt = choice.prompt
    return text_model.decode(prompt.tokens) if prompt.text is None else prompt.text


def choice_timings(piece: ChoicePiece, job: Job) -> dict[str, Any]:
    """What a choice's last piece adds to it, where the client asked for timings; null when the router has
    forgotten them since."""
    if not job.timings or piece.finish is None:
        return {}
    return {"timings": None if piece.report is None else timings_json(piece.report)}


@dataclass(slots=True)
class _WholeChoice:
    choice: ChoiceJob
    pieces: list[ChoicePiece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return unpack_tokens(b"".join(piece.tokens for piece in self.pieces))

    @property
    def finish(self) -> FinishReason | None:
        return self.pieces[-1].finish


async def _gather(pieces: AsyncIterable[ChoicePiece], job: Job) -> tuple[Usage, list[_WholeChoice]]:
    usage = Usage(job)
    choices = [_WholeChoice(choice) for choice in job.choices]
    async for piece in pieces:
        usage.add(piece)
        choices[piece.index].pieces.append(piece)
    return usage, choices


def _completion_choice(whole: _WholeChoice, job: Job, text_model: TextModel) -> dict[str, Any]:
    echo = echoed_text(whole.choice, text_model) if job.echo else ""
    choice: dict[str, Any] = {
        "index": whole.choice.index,
        "text": echo + whole.text,
        "logprobs": None,
        "finish_reason": whole.finish,
    }
    if job.logprobs is not None:
        parts = [completion_logprobs(piece, len(echo), text_model) for piece in whole.pieces]
        choice["logprobs"] = joined_completion_logprobs(parts)
    if job.return_token_ids:
        choice["prompt_token_ids"] = unpack_tokens(whole.choice.prompt.tokens)
        choice["token_ids"] = whole.token_ids
    return choice | choice_timings(whole.pieces[-1], job)


def _chat_choice(whole: _WholeChoice, job: Job, text_model: TextModel) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": whole.choice.index,
        "message": {"role": "assistant", "content": whole.text, "refusal": None},
        "logprobs": None,
        "finish_reason": whole.finish,
    }
    if job.logprobs is not None:
        entries = [entry for piece in whole.pieces for entry in chat_logprobs(piece, text_model)]
        choice["logprobs"] = {"content": entries, "refusal": None}
    if job.return_token_ids:
        choice["token_ids"] = whole.token_ids
    return choice | choice_timings(whole.pieces[-1], job)


def _body(kind: str, head: AnswerHead, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": head.answer_id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage.as_json(),
    }


def _cached_tokens(timings: RequestTimings) -> int:
    return max(timings.cached_prompt_tokens_prefill, timings.cached_prompt_tokens_decode)
