"""The sampling fields of a request, checked and with their defaults filled in."""

from typing import TypeVar

from pdserve.contract.errors import InvalidRequest
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.work import ModelInfo
from router.api_settings import ApiLimits
from router.bounds import check_above, check_count, check_int_range, check_range, check_token_ids
from router.openai_schema import SamplingBody

T = TypeVar("T")

_MAX_PENALTY = 2.0
_REPETITION_PENALTIES = (0.001, 100.0)  # logits are divided by it, and must stay finite
_MAX_LOGIT_BIAS = 100.0
_MAX_ID_DIGITS = 12


def read_sampling(
    body: SamplingBody, logprobs: int | None, info: ModelInfo, limits: ApiLimits
) -> SamplingParams:
    """Everything but `max_tokens`, which depends on the prompt. Raises InvalidRequest naming the field."""
    _check_numbers(body, info, limits)
    check_count("stop_token_ids", len(body.stop_token_ids), limits.max_stop_token_ids)
    check_token_ids("stop_token_ids", body.stop_token_ids, info.vocab_size)
    return SamplingParams(
        min_tokens=given_or(body.min_tokens, 0),
        temperature=given_or(body.temperature, 1.0),
        top_k=max(0, given_or(body.top_k, 0)),
        top_p=given_or(body.top_p, 1.0),
        min_p=given_or(body.min_p, 0.0),
        repetition_penalty=given_or(body.repetition_penalty, 1.0),
        presence_penalty=given_or(body.presence_penalty, 0.0),
        frequency_penalty=given_or(body.frequency_penalty, 0.0),
        logit_bias=_read_logit_bias(body.logit_bias or {}, info, limits),
        logprobs=logprobs,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=given_or(body.ignore_eos, False),
    )


def check_stops(stops: tuple[str, ...], limits: ApiLimits) -> None:
    """Stop strings are few, short and not empty."""
    check_count("stop", len(stops), limits.max_stop_strings)
    if "" in stops:
        raise InvalidRequest("'stop' must not hold an empty string", param="stop")
    longest = max(map(len, stops), default=0)
    if longest > limits.max_stop_characters:
        message = (
            f"'stop' strings may have at most {limits.max_stop_characters} characters, got one of {longest}"
        )
        raise InvalidRequest(message, param="stop")


def given_or(value: T | None, default: T) -> T:
    """What was sent, or the default."""
    return default if value is None else value


def _check_numbers(body: SamplingBody, info: ModelInfo, limits: ApiLimits) -> None:
    check_range("temperature", body.temperature, 0.0, limits.max_temperature)
    check_int_range("top_k", body.top_k, -1, 2**31 - 1)  # -1 and 0 both keep all, as vLLM has it
    check_above("top_p", body.top_p, 0.0, 1.0)
    check_range("min_p", body.min_p, 0.0, 1.0)
    check_range("repetition_penalty", body.repetition_penalty, *_REPETITION_PENALTIES)
    check_range("presence_penalty", body.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
    check_range("frequency_penalty", body.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
    check_int_range("min_tokens", body.min_tokens, 0, info.max_model_len)


def _read_logit_bias(
    bias: dict[str, float], info: ModelInfo, limits: ApiLimits
) -> tuple[tuple[int, float], ...]:
    check_count("logit_bias", len(bias), limits.max_logit_bias)
    values = {_token_id(key): value for key, value in bias.items()}
    check_token_ids("logit_bias", tuple(values), info.vocab_size)
    for value in values.values():
        check_range("logit_bias", value, -_MAX_LOGIT_BIAS, _MAX_LOGIT_BIAS)
    return tuple(values.items())


def _token_id(key: str) -> int:
    if not (key.isascii() and key.removeprefix("-").isdigit() and len(key) <= _MAX_ID_DIGITS):
        raise InvalidRequest(f"'logit_bias' keys must be token ids, got '{key[:60]}'", param="logit_bias")
    return int(key)
