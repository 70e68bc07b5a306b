"""The bodies of OpenAI's completions and chat requests, with the extensions that vLLM has too.

Only shapes and types are checked here; `router.intake` checks values against the model. An unknown
field, an unsupported one and a wrong type each get one sentence that names the field.
"""

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pdserve.contract.errors import InvalidRequest

_UNSUPPORTED = frozenset(
    {
        "audio",
        "function_call",
        "functions",
        "guided_json",
        "guided_regex",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_logprobs",
        "reasoning_effort",
        "response_format",
        "service_tier",
        "store",
        "suffix",
        "tool_choice",
        "tools",
        "use_beam_search",
        "web_search_options",
    }
)
"""Fields that other servers know and this one refuses."""


def _listed(value: Any) -> Any:
    """One stop string as a list of one; absent as none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _joined(value: Any) -> Any:
    """Text parts of a message as one string, one part per line."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('may only have parts of the form {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool | None = None
    """As vLLM has it: with `include_usage`, every event has the usage so far."""


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]
    name: str | None = None


class SamplingBody(_Body):
    """What both kinds of request share. None means that the field was not sent."""

    model: str | None = None
    n: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    user: str | None = None
    """Taken and not used."""
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_listed)] = ()
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    return_token_ids: bool | None = None
    timings: bool | None = None
    priority: int | None = None


class CompletionBody(SamplingBody):
    prompt: Any
    """Text, a list of texts, a list of token ids, or a list of such lists."""
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class ChatBody(SamplingBody):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


Body = TypeVar("Body", bound=_Body)


def parse_json(kind: type[Body], raw: bytes) -> Body:
    """Read a request body. Raises InvalidRequest that names the field."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _invalid(kind, error) from None


def parse_fields(kind: type[Body], fields: dict[str, Any]) -> Body:
    """As `parse_json`, of values that are Python's already."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(kind, error) from None


def _invalid(kind: type[Body], error: ValidationError) -> InvalidRequest:
    """The first complaint in one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = _path(first["loc"])
    match first["type"]:
        case "json_invalid":
            return InvalidRequest(
                f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
            )
        case "missing":
            return InvalidRequest(f"'{path}' is required", param=path)
        case "extra_forbidden":
            return InvalidRequest(_unknown_field(kind, path), param=path)
        case "value_error":
            return InvalidRequest(f"'{path}' {first['msg'].removeprefix('Value error, ')}", param=path)
    if not path:
        return InvalidRequest("the body must be a JSON object")
    expected = first["msg"].replace("Input should be", "must be")
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return InvalidRequest(f"'{path}' {expected}, got {_shown(first['input'])}", param=path)


def _unknown_field(kind: type[Body], path: str) -> str:
    if path in _UNSUPPORTED:
        return f"'{path}' is not supported by this server; leave it out"
    close = difflib.get_close_matches(path, kind.model_fields, n=1)
    return f"unknown field '{path}'" + (f"; did you mean '{close[0]}'?" if close else "")


def _path(location: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') -> messages[0].role"""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")


def _shown(value: Any) -> str:
    """A value as the client wrote it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
