"""Checks of single values, with messages that name the field, its bounds and what was sent."""

from collections.abc import Sequence

from pdserve.contract.errors import InvalidRequest, RequestTooLong
from pdserve.contract.work import ModelInfo


def check_range(field: str, value: float | None, low: float, high: float) -> None:
    """`value` must lie in [low, high]; None was not sent."""
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"'{field}' must be between {low:g} and {high:g}, got {value:g}", param=field)


def check_int_range(field: str, value: int | None, low: int, high: int) -> None:
    """As `check_range`, for integers of any size."""
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"'{field}' must be between {low} and {high}, got {value}", param=field)


def check_above(field: str, value: float | None, low: float, high: float) -> None:
    """`value` must lie in (low, high]; None was not sent."""
    if value is not None and not low < value <= high:
        raise InvalidRequest(
            f"'{field}' must be greater than {low:g} and at most {high:g}, got {value:g}", param=field
        )


def check_count(field: str, count: int, high: int) -> None:
    """A list may have at most `high` entries."""
    if count > high:
        raise InvalidRequest(f"'{field}' may have at most {high} entries, got {count}", param=field)


def most_tokens(info: ModelInfo) -> int:
    """Most tokens of prompt and answer together that any worker can serve."""
    return min(info.max_model_len, info.pool_tokens)


def check_length(num_tokens: int, info: ModelInfo, what: str, param: str | None = None) -> None:
    """`num_tokens` of prompt and answer must be servable; `what` says in the error how they come about."""
    if num_tokens > info.max_model_len:
        bound = f"the model takes {info.max_model_len} tokens of prompt and answer together"
    elif num_tokens > info.pool_tokens:
        bound = (
            f"the largest KV pool holds {info.pool_tokens} tokens of prompt and answer together "
            "(engine.kv_memory makes it larger)"
        )
    else:
        return
    raise RequestTooLong(f"{what}: {bound}", param=param)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Every id must be in the model's vocabulary."""
    if not token_ids:
        return
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise InvalidRequest(
            f"'{field}' has token id {worst}; the model's vocabulary has ids 0 to {vocab_size - 1}",
            param=field,
        )
