"""The `prompt` of a completions request: text, texts, token ids or lists of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.contract.errors import InvalidRequest
from pdserve.contract.tokens import TokenBytes, pack_tokens
from pdserve.contract.work import ModelInfo
from router.api_settings import ApiLimits
from router.bounds import check_count, check_token_ids
from router.text import TextModel

_SHAPES = "a string, a list of strings, a list of token ids or a list of lists of token ids"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as tokens; `text` when it came as text."""

    tokens: TokenBytes
    text: str | None = None


def read_prompts(value: Any, text_model: TextModel, info: ModelInfo, limits: ApiLimits) -> tuple[Prompt, ...]:
    """All prompts of a request. Raises InvalidRequest for other shapes and for ids that do not exist."""
    entries = _entries(value)
    check_count("prompt", len(entries), limits.max_prompts)
    return tuple(_read_one(entry, text_model, info) for entry in entries)


def _entries(value: Any) -> Sequence[str | list[int]]:
    """One or several prompts as several, each a string or a list of ids."""
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        return [value]
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
        return list(value)
    problem = "an empty list" if value == [] else "something else"
    raise InvalidRequest(f"'prompt' must be {_SHAPES}, got {problem}", param="prompt")


def _read_one(entry: str | list[int], text_model: TextModel, info: ModelInfo) -> Prompt:
    if isinstance(entry, str):
        prompt = Prompt(text_model.encode(entry), entry)
    else:
        check_token_ids("prompt", entry, info.vocab_size)
        prompt = Prompt(pack_tokens(entry))
    if not prompt.tokens:
        raise InvalidRequest("'prompt' must have at least one token, got none", param="prompt")
    return prompt
