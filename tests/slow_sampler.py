"""The sampler once more, slowly: one row, float64, sorting, exact fractions where a set is decided."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pdserve.contract.sampling import SamplingParams
from pdserve.contract.work import SampleRequest

Floats = npt.NDArray[Any]


def reference_token(row: Tensor, request: SampleRequest, eos_token_ids: tuple[int, ...]) -> int:
    """The token after logits `row` [vocab]."""
    scores, params = _scores(row, request, eos_token_ids), request.params
    if params.temperature == 0:
        return int(np.argmax(scores))
    weights = np.exp((scores - scores.max()) / params.temperature)
    kept = _kept(weights, params)
    candidates = weights * (weights >= max(_top_k_weight(weights, params), params.min_p))
    for attempt in range(10_000):
        bound = candidates.sum() * _uniform(request, attempt)
        token = int(np.searchsorted(candidates.cumsum(), bound, side="right"))
        if kept[token]:
            return token
        candidates[candidates <= candidates[token]] = 0
    raise AssertionError("nothing was kept")


def _scores(row: Tensor, request: SampleRequest, eos_token_ids: tuple[int, ...]) -> Floats:
    """Logits after bias, bans and penalties, token by token."""
    params = request.params
    scores = row.double().numpy().copy()
    for token, bias in params.logit_bias:
        scores[token] += bias
    if request.output_index < params.min_tokens:
        endings = params.stop_token_ids + (() if params.ignore_eos else eos_token_ids)
        scores[list(endings)] = -math.inf
    if not params.needs_history:
        return scores
    history = np.frombuffer(request.history, np.uint32).tolist()
    output = history[request.num_prompt_tokens :]
    for token in set(history):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= params.frequency_penalty * output.count(token)
        scores[token] -= params.presence_penalty * (token in output)
    return scores


def _kept(weights: Floats, params: SamplingParams) -> Floats:
    """Which tokens top-k, top-p and min-p leave, by sorting."""
    kept = weights >= _top_k_weight(weights, params)
    if params.top_p < 1:
        ranked = np.sort(weights[kept])[::-1]
        enough = np.searchsorted(ranked.cumsum(), params.top_p * ranked.sum())
        kept &= weights >= ranked[min(enough, len(ranked) - 1)]
    return kept & (weights >= params.min_p)


def _top_k_weight(weights: Floats, params: SamplingParams) -> float:
    k = min(params.top_k, len(weights)) or len(weights)
    return float(np.sort(weights)[-k])


def _uniform(request: SampleRequest, attempt: int) -> float:
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in (request.seed, request.position, attempt):
            state = state + np.uint64(number) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return float(Fraction(int(state) >> 11, 2**53))
