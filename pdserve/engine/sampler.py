"""From logits to tokens: a pure function of (logits row, parameters, seed, position, history).

The steps, in this order: logit bias, tokens banned by `min_tokens`, penalties (repetition, then frequency
and presence), temperature, top-k, top-p of what top-k left, min-p, draw. Bans come after the bias so that
no bias lifts them; penalties come after the bias because they act on what the model is about to prefer;
truncation comes after the temperature because it speaks of the probabilities that are drawn from.

A row's result never depends on the rows beside it, to the last bit. Floating-point sums do (their order
changes with shape, device and threads), so there is none here. Probabilities become integers: the most
likely token weighs `scale`, a power of two, and every other one its share of that, rounded. All weights
of a row sum to less than 2**53, so float64 adds them exactly in any order. What is left in floating point
is computed element by element, and maxima and selections are exact by nature.

A token is drawn by inverse transform: a 53-bit hash of (seed, position) is scaled to the total weight, and
sums over chunks, then inside one chunk, find the token. Gumbel-max would need a random number and two
logarithms for every token of the vocabulary instead.

Top-p needs no sorting. A drawn token is outside the nucleus if the tokens above it already weigh top_p of
the total; then everything that is not above it is outside as well and is dropped, and another token is
drawn from the rest. Drawing again until a token is inside gives each token of the nucleus its exact
probability; without min-p the first draw is inside with a probability of at least top_p. (Rejection
sampling with a rising pivot is FlashInfer's method.)

Top-k, top-p and min-p keep tokens that are exactly as likely as the last one kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdserve.contract.sampling import SamplingParams
from pdserve.contract.work import SampledToken, SampleRequest, TokenLogprobs

_CHUNK = 256
"""Tokens per partial sum or partial maximum."""

_RUN = 64
"""Tokens that the search for the k-th largest takes or leaves together; divides `_CHUNK`."""

_GROUP_ELEMENTS = 1 << 19
"""Logits that the CPU works on at a time, so that all steps find them in its cache."""

_RANDOM_BITS = 53


def sample(
    logits: Tensor, requests: Sequence[SampleRequest], eos_token_ids: Sequence[int]
) -> list[SampledToken]:
    """Sample one token per row of `logits` [n, vocab], of any float dtype, on any device.

    `requests[i]` belongs to row i. Raises ValueError when their numbers differ, or when a row to draw from
    holds nan, +inf or nothing but -inf.
    """
    if len(requests) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits but {len(requests)} requests to sample for")
    if all(_is_plain_greedy(request) for request in requests):
        return [SampledToken(token) for token in _first_argmax(logits).tolist()]
    group = max(1, _GROUP_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(requests)
    sampled: list[SampledToken] = []
    for start in range(0, len(requests), group):
        rows = slice(start, start + group)
        sampled += _sample_group(logits[rows], requests[rows], eos_token_ids)
    return sampled


def _is_plain_greedy(request: SampleRequest) -> bool:
    """Whether the largest logit is all that is asked for."""
    params = request.params
    adjusted = params.logit_bias or params.needs_history or _bans_endings(request)
    return params.temperature == 0 and params.logprobs is None and not adjusted


def _bans_endings(request: SampleRequest) -> bool:
    return request.output_index < request.params.min_tokens


def _first_argmax(logits: Tensor) -> Tensor:
    """Index of the first of the largest values of each row: [n, vocab] -> int64 [n].

    The same as `argmax`, which is several times slower on CPU than the maxima of chunks are.
    """
    vocab_size = logits.shape[1]
    whole = vocab_size - vocab_size % _CHUNK
    maxima = logits[:, :whole].view(len(logits), whole // _CHUNK, _CHUNK).amax(2)
    if whole < vocab_size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(1, keepdim=True)], 1)
    start = maxima.argmax(1, keepdim=True) * _CHUNK
    columns = start + torch.arange(_CHUNK, device=logits.device)
    inside = logits.gather(1, columns.clamp(max=vocab_size - 1))
    first: Tensor = start.squeeze(1) + inside.argmax(1)
    return first


def _sample_group(
    logits: Tensor, requests: Sequence[SampleRequest], eos_token_ids: Sequence[int]
) -> list[SampledToken]:
    scores = _padded_float32(logits)
    _add_bias(scores, requests)
    _ban_endings(scores, requests, eos_token_ids)
    _penalise(scores, requests)
    tokens = _choose(scores, requests)
    logprobs = _logprobs(logits, requests, tokens)
    return [SampledToken(token, logprobs.get(row)) for row, token in enumerate(tokens)]


def _padded_float32(logits: Tensor) -> Tensor:
    """A float32 copy whose rows are filled up to whole chunks with -inf."""
    num_rows, vocab_size = logits.shape
    width = -(-vocab_size // _CHUNK) * _CHUNK
    padded = torch.empty((num_rows, width), dtype=torch.float32, device=logits.device)
    padded[:, :vocab_size] = logits
    padded[:, vocab_size:] = -math.inf
    return padded


def _add_bias(scores: Tensor, requests: Sequence[SampleRequest]) -> None:
    entries = [(row, *pair) for row, request in enumerate(requests) for pair in request.params.logit_bias]
    if entries:
        rows, tokens, values = zip(*entries, strict=True)
        index = _indices(rows, scores), _indices(tokens, scores)
        scores.index_put_(index, _floats(values, scores), accumulate=True)


def _ban_endings(scores: Tensor, requests: Sequence[SampleRequest], eos_token_ids: Sequence[int]) -> None:
    """Until `min_tokens` are there, the tokens that would end the request cannot be chosen."""
    entries = [
        (row, token)
        for row, request in enumerate(requests)
        if _bans_endings(request)
        for token in _ending_tokens(request.params, eos_token_ids)
    ]
    if entries:
        rows, tokens = zip(*entries, strict=True)
        scores[_indices(rows, scores), _indices(tokens, scores)] = -math.inf


def _ending_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> Sequence[int]:
    return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)


def _penalise(scores: Tensor, requests: Sequence[SampleRequest]) -> None:
    """Repetition, then frequency and presence penalties, for all rows that ask for any."""
    parts = [_penalties(row, request) for row, request in enumerate(requests) if request.params.needs_history]
    if not parts:
        return
    rows, tokens, factors, deductions = (np.concatenate(column) for column in zip(*parts, strict=True))
    index = _indices(rows, scores), _indices(tokens, scores)
    factor, old = _floats(factors, scores), scores[index]
    scores[index] = torch.where(old > 0, old / factor, old * factor) - _floats(deductions, scores)


def _penalties(row: int, request: SampleRequest) -> tuple[npt.NDArray[Any], ...]:
    """What one row's history does: (row, token, divisor of a positive score, deduction) per token."""
    history = np.frombuffer(request.history, "<u4").astype(np.int64)
    tokens, index = np.unique(history, return_inverse=True)
    uses = np.bincount(index[request.num_prompt_tokens :], minlength=len(tokens))
    params = request.params
    deductions = params.presence_penalty * (uses > 0) + params.frequency_penalty * uses
    return np.full_like(tokens, row), tokens, np.full(len(tokens), params.repetition_penalty), deductions


def _choose(scores: Tensor, requests: Sequence[SampleRequest]) -> list[int]:
    """Greedy rows take their largest score, all others draw. Overwrites `scores`."""
    drawing = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    tokens: list[int] = [0] * len(requests)
    if len(drawing) < len(requests):
        tokens = _first_argmax(scores).tolist()
    if drawing:
        drawn = _draw(_select(scores, drawing), [requests[row] for row in drawing])
        for row, token in zip(drawing, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw(scores: Tensor, requests: Sequence[SampleRequest]) -> list[int]:
    """Draw one token per row. Overwrites `scores`."""
    weights = _weights_(scores, [request.params.temperature for request in requests])
    nucleus = _truncate_(weights, [request.params for request in requests])
    tokens = [0] * len(requests)
    rows = list(range(len(requests)))
    attempt = 0
    while rows:
        drawn = _invert(weights, [_random_bits(requests[row], attempt) for row in rows])
        for row, token in zip(rows, drawn.tolist(), strict=True):
            tokens[row] = token
        if nucleus is None:
            return tokens
        picked = weights.gather(1, drawn[:, None])
        outside = (_sum(_above(weights, picked)) >= nucleus).nonzero()[:, 0]
        weights, nucleus = _above(weights[outside], picked[outside]), nucleus[outside]
        rows = [rows[index] for index in outside.tolist()]
        attempt += 1
    return tokens


def _scale(width: int) -> float:
    """Weight of the most likely token; `width` such weights still sum to less than 2**53."""
    return float(2 ** (52 - (width - 1).bit_length()))


def _weights_(scores: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Turn scores [n, width] into integer weights, in place; see the module's description."""
    tiny = torch.finfo(torch.float32).tiny
    divisors = _floats([max(temperature, tiny) for temperature in temperatures], scores)
    scores -= scores.amax(1, keepdim=True)
    scores /= divisors[:, None]
    return scores.exp_().mul_(_scale(scores.shape[1])).round_()


def _truncate_(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """Zero what top-k and min-p exclude, in place. Returns the weight float64 [n] at which each row's
    nucleus is full (inf without top-p), or None when no row has one."""
    top_k = [min(param.top_k, weights.shape[1]) for param in params]
    if any(top_k):
        rows = [row for row, k in enumerate(top_k) if k]
        least = torch.zeros(len(params), device=weights.device)
        least[rows] = _kth_largest(_select(weights, rows), [top_k[row] for row in rows])
        _drop_below_(weights, least)
    nucleus = _nucleus(weights, params)
    if any(param.min_p for param in params):
        least = _floats([param.min_p * _scale(weights.shape[1]) for param in params], weights)
        _drop_below_(weights, least)
    return nucleus


def _nucleus(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    if all(param.top_p >= 1 for param in params):
        return None
    shares = _floats64([param.top_p if param.top_p < 1 else math.inf for param in params], weights)
    return (_sum(weights) * shares).clamp(min=1)


def _kth_largest(values: Tensor, ks: Sequence[int]) -> Tensor:
    """The `ks[i]`-th largest value of row i.

    The k largest values of a row are in the k runs with the largest maxima, so only those are searched.
    """
    most = max(ks)
    runs = values.view(len(values), -1, _RUN)
    if most < runs.shape[1]:
        best = runs.amax(2).topk(most, 1).indices
        values = runs.gather(1, best[:, :, None].expand(-1, -1, _RUN)).flatten(1)
    largest = values.topk(most, 1).values
    return largest.gather(1, _indices(ks, values)[:, None] - 1).squeeze(1)


def _invert(weights: Tensor, random_bits: Sequence[int]) -> Tensor:
    """The token of each row in whose part of the total weight a random number falls: int64 [n]."""
    chunks = weights.view(len(weights), -1, _CHUNK)
    sums = chunks.sum(2, dtype=torch.float64)
    ends = sums.cumsum(1)
    targets = _floats64(_targets(ends[:, -1].tolist(), random_bits), weights)[:, None]
    chunk = torch.searchsorted(ends, targets, right=True)
    start = (ends - sums).gather(1, chunk)
    rows = torch.arange(len(weights), device=weights.device)
    inside = chunks[rows, chunk.squeeze(1)].double().cumsum(1)
    offset = torch.searchsorted(inside, targets - start, right=True)
    return (chunk * _CHUNK + offset).squeeze(1)


def _targets(totals: Sequence[float], random_bits: Sequence[int]) -> list[int]:
    """Uniform integers in [0, total)."""
    if not all(total > 0 for total in totals):
        raise ValueError("a row of logits holds nan, +inf or only -inf; the model's output is broken")
    return [bits * int(total) >> _RANDOM_BITS for bits, total in zip(random_bits, totals, strict=True)]


def _sum(weights: Tensor) -> Tensor:
    """Exact sum of each row: float64 [n]."""
    return weights.sum(1, dtype=torch.float64)


def _above(weights: Tensor, bound: Tensor) -> Tensor:
    """A copy of `weights` that is zero where they are not above `bound` [n, 1].

    The mask is of floats because masks of booleans are several times slower on CPU.
    """
    return torch.gt(weights, bound, out=torch.empty_like(weights)).mul_(weights)


def _drop_below_(weights: Tensor, bound: Tensor) -> None:
    """Zero the weights below `bound` [n], in place."""
    weights.mul_(torch.ge(weights, bound[:, None], out=torch.empty_like(weights)))


def _random_bits(request: SampleRequest, attempt: int) -> int:
    """53 random bits, the same for the same (seed, position, attempt)."""
    return _mix(_mix(_mix(request.seed) + request.position) + attempt) >> (64 - _RANDOM_BITS)


def _mix(number: int) -> int:
    """One step of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    mask = 2**64 - 1
    number = (number + 0x9E3779B97F4A7C15) & mask
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
    return number ^ (number >> 31)


def _logprobs(
    logits: Tensor, requests: Sequence[SampleRequest], tokens: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Row -> log probabilities under the model's own distribution, for the rows that ask for them."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    scores = _padded_float32(_select(logits, rows))
    limits = [min(requests[row].params.logprobs or 0, logits.shape[1]) for row in rows]
    tops = _most_likely(scores, limits)
    chosen = scores.gather(1, _indices([tokens[row] for row in rows], scores)[:, None])[:, 0].tolist()
    norms = _log_sums(scores)
    return {
        row: TokenLogprobs(score - norm, tuple((token, value - norm) for value, token in top))
        for row, score, norm, top in zip(rows, chosen, norms, tops, strict=True)
    }


def _log_sums(scores: Tensor) -> list[float]:
    """Logarithm of each row's sum of exponentials. Overwrites `scores`."""
    maxima = scores.amax(1).tolist()
    weights = _weights_(scores, [1.0] * len(scores))
    totals = _sum(weights).tolist()
    scale = _scale(scores.shape[1])
    return [maximum + math.log(total / scale) for maximum, total in zip(maxima, totals, strict=True)]


def _most_likely(scores: Tensor, limits: Sequence[int]) -> list[list[tuple[float, int]]]:
    """The `limits[i]` largest (score, token) of row i, largest first, of equals the smallest token."""
    if not any(limits):
        return [[] for _ in limits]
    least = _kth_largest(scores, [max(1, limit) for limit in limits])
    rows, tokens = (scores >= least[:, None]).nonzero(as_tuple=True)
    found: list[list[tuple[float, int]]] = [[] for _ in limits]
    for row, token, score in zip(rows.tolist(), tokens.tolist(), scores[rows, tokens].tolist(), strict=True):
        found[row].append((score, token))
    return [
        sorted(row, key=lambda pair: (-pair[0], pair[1]))[:limit]
        for row, limit in zip(found, limits, strict=True)
    ]


def _select(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """The given rows; the matrix itself, not a copy, when these are all."""
    return matrix if len(rows) == len(matrix) else matrix[rows]


def _indices(values: Sequence[int] | npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.int64)).to(like.device)


def _floats(values: Sequence[float] | npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.float32)).to(like.device)


def _floats64(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)
