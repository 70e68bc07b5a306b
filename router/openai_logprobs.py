"""Log probabilities in the two shapes that OpenAI's APIs give them."""

from collections.abc import Sequence
from typing import Any

from pdserve.contract.tokens import unpack_tokens
from pdserve.contract.work import TokenLogprobs
from router.choices import ChoicePiece
from router.text import TextModel

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def completion_logprobs(piece: ChoicePiece, shift: int, text_model: TextModel) -> dict[str, Any]:
    """The shape of /v1/completions; `shift` is added to the offsets (the length of an echoed prompt)."""
    token_ids = unpack_tokens(piece.tokens)
    return {
        "tokens": [_name(token_id, text_model) for token_id in token_ids],
        "token_logprobs": [_number(entry.chosen) for entry in piece.logprobs],
        "top_logprobs": [
            _by_name(token_id, entry, text_model)
            for token_id, entry in zip(token_ids, piece.logprobs, strict=True)
        ],
        "text_offset": [shift + offset for offset in piece.offsets],
    }


def joined_completion_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one choice as one."""
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [entry for part in parts for entry in part[key]] for key in keys}


def chat_logprobs(piece: ChoicePiece, text_model: TextModel) -> list[dict[str, Any]]:
    """The entries of `logprobs.content` of /v1/chat/completions, one per token."""
    return [
        _entry(token_id, logprobs.chosen, text_model)
        | {"top_logprobs": [_entry(other, value, text_model) for other, value in logprobs.top]}
        for token_id, logprobs in zip(unpack_tokens(piece.tokens), piece.logprobs, strict=True)
    ]


def _by_name(token_id: int, logprobs: TokenLogprobs, text_model: TextModel) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two with one name the more likely one."""
    named: dict[str, float] = {}
    for other, value in (*logprobs.top, (token_id, logprobs.chosen)):
        named.setdefault(_name(other, text_model), _number(value))
    return named


def _entry(token_id: int, logprob: float, text_model: TextModel) -> dict[str, Any]:
    spelled = text_model.token_bytes(token_id)
    return {
        "token": spelled.decode("utf-8", "replace"),
        "logprob": _number(logprob),
        "bytes": list(spelled),
    }


def _name(token_id: int, text_model: TextModel) -> str:
    return text_model.token_bytes(token_id).decode("utf-8", "replace")


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
