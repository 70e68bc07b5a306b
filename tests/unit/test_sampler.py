"""The sampler against a slow reference, against transformers, and against itself in other company."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SampleRequest
from pdserve.engine.sampler import _invert, _weights_, sample
from tests.slow_sampler import Floats, reference_token

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

EOS = (2,)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request(params: SamplingParams, seed: int = 11, position: int = 40, **rest: Any) -> SampleRequest:
    return SampleRequest(params, seed, position, **{"output_index": 0, **rest})


def tokens_of(logits: Tensor, requests: list[SampleRequest]) -> list[int]:
    return [sampled.token for sampled in sample(logits, requests, EOS)]


def token_of(row: list[float], params: SamplingParams, **rest: Any) -> int:
    return tokens_of(torch.tensor([row]), [request(params, **rest)])[0]


def draw_many(row: Tensor, params: SamplingParams, count: int) -> Floats:
    """How often each token is drawn for `count` positions of one request."""
    requests = [request(params, position=position) for position in range(count)]
    return np.bincount(tokens_of(row.expand(count, -1), requests), minlength=len(row))


def random_logits(num_rows: int, vocab_size: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


HISTORY = pack_tokens([3, 3, 5, 9, 9, 9, 1, 5])

VARIANTS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1e-6),
    SamplingParams(temperature=5.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=40, temperature=1.5),
    SamplingParams(top_k=10**9),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.95, temperature=3.0),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.2),
    SamplingParams(top_k=30, top_p=0.6, min_p=0.01, temperature=2.0),
    SamplingParams(logit_bias=((4, 6.0), (0, -100.0)), temperature=0.8),
    SamplingParams(min_tokens=3, stop_token_ids=(4, 6)),
    SamplingParams(min_tokens=3, stop_token_ids=(4,), ignore_eos=True, logit_bias=((2, 5.0), (4, 9.0))),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7),
    SamplingParams(presence_penalty=-1.5, top_p=0.8),
    SamplingParams(frequency_penalty=1.5, temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.0, logprobs=5, logit_bias=((1, 100.0),)),
    SamplingParams(temperature=0.9, logprobs=3, top_k=5),
    GREEDY,
]


def varied_requests(count: int, seed: int = 0) -> list[SampleRequest]:
    requests = []
    for index in range(count):
        params = VARIANTS[index % len(VARIANTS)]
        history = HISTORY if params.needs_history else b""
        requests.append(
            SampleRequest(
                params, seed * 1000 + index, 100 + index // 3, index % 5, history, 3 if history else 0
            )
        )
    return requests


@pytest.mark.parametrize("vocab_size", [10, 255, 256, 257, 1000])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_every_row_is_what_the_slow_reference_says(vocab_size: int, spread: float) -> None:
    requests = varied_requests(20 * len(VARIANTS))
    logits = random_logits(len(requests), vocab_size, vocab_size, spread)
    expected = [reference_token(row, request, EOS) for row, request in zip(logits, requests, strict=True)]
    assert tokens_of(logits, requests) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [7, 256, 1009, 32003])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_alone_gets_the_same_bits_as_in_a_batch(
    dtype: torch.dtype, vocab_size: int, threads: int
) -> None:
    variants = [
        request for request in varied_requests(45) if vocab_size > 9 or not request.params.needs_history
    ]
    logits = random_logits(len(variants), vocab_size, 5).to(dtype)
    torch.set_num_threads(threads)
    together = sample(logits, variants, EOS)
    torch.set_num_threads(1)
    backwards = sample(logits.flip(0), variants[::-1], EOS)[::-1]
    assert together == backwards
    for start in range(0, len(variants), 16):
        rows = slice(start, start + 16)
        assert sample(logits[rows], variants[rows], EOS) == together[rows]
    for row, request in enumerate(variants):
        assert sample(logits[row : row + 1].clone(), [request], EOS) == together[row : row + 1]


def transformers_probabilities(row: Tensor, params: SamplingParams) -> Floats:
    """The distribution that transformers draws from."""
    scores = TemperatureLogitsWarper(params.temperature)(None, row[None].double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    probabilities: Floats = scores.softmax(-1)[0].numpy()
    return probabilities


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.9, temperature=2.0),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=12, top_p=0.8, min_p=0.05, temperature=1.5),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    row = random_logits(1, 30, seed=3, spread=1.0)[0]
    expected = transformers_probabilities(row, params) * 20_000
    drawn = draw_many(row, params, 20_000)
    kept = expected > 0
    assert not drawn[~kept].any()
    chi_square = ((drawn - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert (drawn[kept] > 0).all()


def test_consecutive_seeds_and_positions_are_independent() -> None:
    """Pairs of draws fill a square evenly."""
    row = torch.zeros(16)
    for seeds, positions in ((range(8000), [7] * 8000), ([7] * 8000, range(8000))):
        requests = [
            request(SamplingParams(), seed, position) for seed, position in zip(seeds, positions, strict=True)
        ]
        tokens = np.array(tokens_of(row.expand(8000, -1), requests))
        pairs = np.bincount(tokens[:-1] * 16 + tokens[1:], minlength=256)
        chi_square = ((pairs - 7999 / 256) ** 2 / (7999 / 256)).sum()
        assert chi_square < 255 + 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.2, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    history = [1, 5, 5, 8, 20]
    logits = random_logits(50, 24, seed=9, spread=1.0)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([history] * 50), logits.clone()).argmax(-1).tolist()
    params = replace(GREEDY, repetition_penalty=penalty)
    asked = request(params, history=pack_tokens(history), num_prompt_tokens=2)
    assert tokens_of(logits, [asked] * 50) == expected


def test_presence_and_frequency_look_at_the_output_only() -> None:
    row = [1.0, 0.9, 0.8, 0.5]
    history = pack_tokens([0, 0, 0, 1, 2, 2])
    for params in (replace(GREEDY, presence_penalty=0.6), replace(GREEDY, frequency_penalty=0.6)):
        assert token_of(row, params, history=history, num_prompt_tokens=3) == 0
        assert token_of(row, params, history=history, num_prompt_tokens=1) != 0
    frequency = replace(GREEDY, frequency_penalty=0.06)
    assert token_of(row, frequency, history=history, num_prompt_tokens=0) == 1  # 1 - 3 * 0.06 < 0.9 - 0.06


def test_greedy_takes_the_first_of_the_largest() -> None:
    for vocab_size in (1, 5, 256, 300, 1025):
        row = torch.zeros(1, vocab_size)
        assert tokens_of(row, [request(GREEDY)]) == [0]
        row[0, vocab_size // 2 :] = 3.0
        assert tokens_of(row, [request(GREEDY)]) == [vocab_size // 2]
        assert tokens_of(row.bfloat16(), [request(replace(GREEDY, logprobs=0))]) == [vocab_size // 2]


def test_greedy_is_argmax_on_any_layout() -> None:
    logits = random_logits(64, 1003, seed=1).bfloat16()  # with many equal values
    expected = logits.argmax(1).tolist()
    assert tokens_of(logits, [request(GREEDY)] * 64) == expected
    assert tokens_of(logits.t().contiguous().t(), [request(GREEDY)] * 64) == expected


def test_tokens_as_likely_as_the_last_kept_are_kept() -> None:
    row = torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0])
    for params in (SamplingParams(top_k=1), SamplingParams(top_k=2), SamplingParams(top_p=0.1)):
        assert (draw_many(row, params, 300) > 0).tolist() == [False, True, True, True, False]
    equal = torch.zeros(10)
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.01), SamplingParams(min_p=1.0)):
        assert (draw_many(equal, params, 500) > 0).all()


def test_tiny_temperature_and_tiny_top_p_are_greedy() -> None:
    logits = random_logits(40, 500, seed=2)
    expected = logits.argmax(1).tolist()
    for params in (SamplingParams(temperature=1e-300), SamplingParams(top_p=1e-300)):
        assert tokens_of(logits, [request(params, seed=seed) for seed in range(40)]) == expected


def test_a_huge_bias_forces_and_forbids() -> None:
    row = torch.zeros(300)
    assert draw_many(row, SamplingParams(logit_bias=((257, 1e6),)), 50)[257] == 50
    forbidden = SamplingParams(logit_bias=((0, -1e6), (299, -math.inf)))
    drawn = draw_many(row, forbidden, 5000)
    assert not drawn[[0, 299]].any()
    assert (drawn[1:299] > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_bias_lifts_the_ban_of_min_tokens(temperature: float) -> None:
    row = [0.0, 0.0, 50.0, 40.0, 30.0]
    params = SamplingParams(
        temperature=temperature, min_tokens=2, stop_token_ids=(3,), logit_bias=((2, 100.0),)
    )
    assert token_of(row, params, output_index=1) == 4
    assert token_of(row, params, output_index=2) == 2
    assert token_of(row, replace(params, ignore_eos=True), output_index=0) == 2
    assert token_of(row, replace(params, ignore_eos=True, logit_bias=((3, 100.0),)), output_index=0) == 2


def test_penalties_leave_banned_tokens_banned() -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=9, repetition_penalty=0.5, presence_penalty=-2.0, logit_bias=((2, 9.0),)
    )
    history = pack_tokens([2, 2, 1])
    assert token_of([0.0, 0.5, 9.0], params, history=history, num_prompt_tokens=0) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own(dtype: torch.dtype) -> None:
    """Neither bias nor temperature nor truncation shows in them."""
    logits = random_logits(6, 32003, seed=4).to(dtype)
    params = SamplingParams(logprobs=4, temperature=0.5, top_k=3, logit_bias=((17, 30.0),))
    expected = logits.double().log_softmax(1)
    for row, sampled in enumerate(sample(logits, [request(params)] * 6, EOS)):
        assert sampled.token == 17
        assert sampled.logprobs is not None
        assert sampled.logprobs.chosen == pytest.approx(expected[row, 17].item(), abs=1e-6)
        ranked = np.lexsort((np.arange(32003), -logits[row].double().numpy()))[:4].tolist()
        assert [token for token, _ in sampled.logprobs.top] == ranked
        values = [logprob for _, logprob in sampled.logprobs.top]
        assert values == pytest.approx(expected[row, ranked].tolist(), abs=1e-6)


def test_flat_logits_lose_little_to_rounding() -> None:
    """A quarter million equally unlikely tokens beside a likely one: all are rounded the same way."""
    row = torch.full((1, 262144), -20.0)
    row[0, 77] = 0.0
    (sampled,) = sample(row, [request(replace(GREEDY, logprobs=0))], EOS)
    assert sampled.logprobs is not None
    expected = -math.log1p(262143 * math.exp(-20))
    assert sampled.logprobs.chosen == pytest.approx(expected, abs=1e-5)


def test_logprobs_only_where_asked() -> None:
    logits = random_logits(3, 20, seed=6)
    params = [GREEDY, replace(GREEDY, logprobs=0), replace(GREEDY, logprobs=50)]
    first, second, third = sample(logits, [request(param) for param in params], EOS)
    assert first.logprobs is None
    assert second.logprobs is not None
    assert second.logprobs.top == ()
    assert third.logprobs is not None
    assert len(third.logprobs.top) == 20
    assert third.logprobs.top[0] == (third.token, third.logprobs.chosen)


def test_input_is_not_changed() -> None:
    requests = varied_requests(len(VARIANTS))
    logits = random_logits(len(requests), 512, seed=8)
    before = logits.clone()
    sample(logits, requests, EOS)
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 100), [], EOS) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    row = torch.zeros(1, 300)
    row[0, 3] = bad
    with pytest.raises(ValueError, match="output is broken"):
        sample(row, [request(SamplingParams(top_p=0.5, top_k=4))], EOS)


def test_each_row_needs_its_request() -> None:
    with pytest.raises(ValueError, match="2 rows of logits but 1"):
        sample(torch.zeros(2, 10), [request(GREEDY)], EOS)


def test_nucleus_is_full_when_it_reaches_top_p() -> None:
    row = torch.tensor([0.0, -math.log(2), -math.log(2)])
    assert row.exp().tolist() == [1.0, 0.5, 0.5], "the probabilities are meant to be exact"
    assert (draw_many(row, SamplingParams(top_p=0.5), 300) > 0).tolist() == [True, False, False]
    assert (draw_many(row, SamplingParams(top_p=0.5001), 300) > 0).all()


@pytest.mark.parametrize("width", [256, 32768, 151936, 262144])
def test_weights_add_up_exactly_in_any_order(width: int) -> None:
    """They are integers whose sum stays below 2**53 even when all tokens are equally likely."""
    weights = _weights_(random_logits(1, width, seed=width), [0.7])
    assert torch.equal(weights, weights.trunc())
    assert sum(int(weight) for weight in weights[0].tolist()) == int(weights.double().sum())
    equal = _weights_(torch.zeros(1, width), [1.0])
    assert 2**50 <= equal.double().sum().item() < 2**53


def test_each_token_is_hit_by_exactly_its_weight() -> None:
    """Every target in [0, total) once, with empty tokens at all edges of chunks."""
    weights = torch.zeros(1, 768)
    for token, weight in ((1, 3), (254, 2), (255, 1), (256, 4), (511, 2), (600, 5)):
        weights[0, token] = weight
    total = int(weights.sum())
    targets = [-(-target * 2**53 // total) for target in range(total)]
    hits = _invert(weights.expand(total, -1).contiguous(), targets).bincount(minlength=768)
    assert torch.equal(hits, weights[0].long())
