"""What a worker takes from its peers: values that its engine can serve. Pure.

Routers have checked what clients send, in the words of their APIs (`router.intake`). A worker looks again,
because a value that the engine cannot compute with would end the engine, and with it everybody's requests.
The bounds here are wider than those of the APIs: they keep the arithmetic finite and the messages small.
"""

import math

import numpy as np

from pdserve.contract.errors import InvalidRequest, RequestTooLong
from pdserve.contract.messages import PrefillOpen, Submit
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import BYTES_PER_TOKEN, TokenBytes, num_tokens
from pdserve.contract.tracing import TraceContext
from pdserve.contract.work import ModelInfo

MAX_LOGPROBS = 4096
"""So many per sequence, of hundreds of sequences, fit into one Frame."""

_MAX_TEXT = 1024
"""Characters of ids and salts."""

_LARGE = 1e6
"""Of what is added to logits: far above what can matter, far below what float32 cannot add."""

_MAX_SEED = 2**64 - 1


def check_submit(submit: Submit, info: ModelInfo) -> None:
    """Raises InvalidRequest, whose `param` is the field, or RequestTooLong."""
    _check_text("request_id", submit.request_id)
    _check_text("cache_salt", submit.cache_salt)
    _check_trace(submit.trace)
    _check_tokens("prompt_tokens", submit.prompt_tokens, info.vocab_size)
    _check_tokens("known_output_tokens", submit.known_output_tokens, info.vocab_size)
    _check_range("prompt_tokens", num_tokens(submit.prompt_tokens), 1, math.inf)
    _check_range("seed", submit.seed, 0, _MAX_SEED)
    _check_sampling(submit.sampling, info)
    num_known = num_tokens(submit.known_output_tokens)
    _check_range("known_output_tokens", num_known, 0, submit.sampling.max_tokens - 1)
    _check_length(num_tokens(submit.prompt_tokens) + submit.sampling.max_tokens, info)


def check_prefill_open(opened: PrefillOpen, info: ModelInfo) -> None:
    """Raises InvalidRequest, whose `param` is the field, or RequestTooLong."""
    _check_text("request_id", opened.request_id)
    _check_text("cache_salt", opened.cache_salt)
    _check_trace(opened.trace)
    _check_tokens("tokens", opened.tokens, info.vocab_size)
    _check_range("num_prompt_tokens", opened.num_prompt_tokens, 1, num_tokens(opened.tokens))
    _check_range("seed", opened.seed, 0, _MAX_SEED)
    if opened.sampling is not None:
        _check_sampling(opened.sampling, info)
    _check_length(num_tokens(opened.tokens), info)


def _check_length(num: int, info: ModelInfo) -> None:
    if num > info.max_model_len:
        raise RequestTooLong(f"{num} tokens exceed the model's length of {info.max_model_len}")
    if num > info.pool_tokens:
        raise RequestTooLong(f"{num} tokens do not fit this worker's KV pool of {info.pool_tokens} tokens")


def _check_sampling(params: SamplingParams, info: ModelInfo) -> None:
    _check_range("max_tokens", params.max_tokens, 1, math.inf)
    _check_range("min_tokens", params.min_tokens, 0, math.inf)
    _check_range("temperature", params.temperature, 0, _LARGE)
    _check_range("top_k", params.top_k, 0, math.inf)
    _check_range("top_p", params.top_p, 0, 1)
    _check_range("min_p", params.min_p, 0, 1)
    _check_range("repetition_penalty", params.repetition_penalty, 1e-3, 1e3)
    _check_range("presence_penalty", params.presence_penalty, -_LARGE, _LARGE)
    _check_range("frequency_penalty", params.frequency_penalty, -_LARGE, _LARGE)
    _check_range("logprobs", params.logprobs or 0, 0, MAX_LOGPROBS)
    _check_range("logit_bias", len(params.logit_bias), 0, info.vocab_size)
    for token, value in params.logit_bias:
        _check_range("logit_bias", token, 0, info.vocab_size - 1)
        _check_range("logit_bias", value, -_LARGE, _LARGE)
    _check_stops(params, info)


def _check_stops(params: SamplingParams, info: ModelInfo) -> None:
    _check_range("stop_token_ids", len(params.stop_token_ids), 0, info.vocab_size)
    for token in params.stop_token_ids:
        _check_range("stop_token_ids", token, 0, info.vocab_size - 1)
    ending = {*params.stop_token_ids, *info.eos_token_ids}
    if params.min_tokens and len(ending) >= info.vocab_size:
        raise InvalidRequest("'min_tokens' leaves no token that may be sampled", param="min_tokens")


def _check_tokens(field: str, tokens: TokenBytes, vocab_size: int) -> None:
    if len(tokens) % BYTES_PER_TOKEN:
        raise InvalidRequest(f"'{field}' has {len(tokens)} bytes, which are no whole tokens", param=field)
    if tokens:
        _check_range(field, int(np.frombuffer(tokens, "<u4").max()), 0, vocab_size - 1)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    """`value` must lie in [low, high]; nan never does."""
    if not low <= value <= high:
        raise InvalidRequest(f"'{field}' must be between {low} and {high}, got {value}", param=field)


def _check_trace(trace: TraceContext | None) -> None:
    if trace is not None:
        _check_text("traceparent", trace.traceparent)
        _check_text("tracestate", trace.tracestate)


def _check_text(field: str, text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise InvalidRequest(
            f"'{field}' has {len(text)} characters, at most {_MAX_TEXT} are taken", param=field
        )
