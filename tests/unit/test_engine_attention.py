"""Attention by parts and tiles against the formula written out in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pdserve.engine.tile_attention import attend_chunk, attend_rows, attend_rows_by_head, fade, merge

SCALE = 0.3
SINKS = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.1, -3.0]])


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """query [heads, rows, dim], key and value [heads, keys, dim], seen [rows, keys] -> [rows, heads, dim]."""
    scores = query.double() @ key.double().transpose(1, 2) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf).exp()
    total = scores.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return (scores / total @ value.double()).transpose(0, 1)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_parts", [1, 4])
def test_merged_parts_of_a_chunk_are_the_whole(
    num_parts: int, softcap: float | None, with_sinks: bool
) -> None:
    torch.manual_seed(0)
    kv_heads, groups, rows, keys = 3, 2, 8, 64
    query = torch.randn(kv_heads, groups, rows, 16)
    key, value = torch.randn(kv_heads, keys, 16), torch.randn(kv_heads, keys, 16)
    mask = torch.zeros(rows, rows).masked_fill(~torch.ones(rows, rows, dtype=torch.bool).tril(), -torch.inf)
    masks = [*[None] * (num_parts - 1), mask]
    parts = [
        attend_chunk(query, k, v, mask, scale=SCALE, softcap=softcap, with_log_sum=True)
        for k, v, mask in zip(key.chunk(num_parts, 1), value.chunk(num_parts, 1), masks, strict=True)
    ]
    log_sums = torch.stack([log_sum for _, log_sum in parts if log_sum is not None])
    output = merge(torch.stack([output for output, _ in parts]), log_sums)
    if with_sinks:
        output = fade(output, torch.logsumexp(log_sums, 0), SINKS[:, :, None])
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    expected = by_formula(
        query.flatten(0, 1),
        key.repeat_interleave(groups, 0),
        value.repeat_interleave(groups, 0),
        seen,
        softcap,
        SINKS.flatten() if with_sinks else None,
    )
    got = output.permute(2, 0, 1, 3).flatten(1, 2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [attend_rows, attend_rows_by_head])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_several_sequences(
    groups: int, softcap: float | None, with_sinks: bool, attend: Callable[..., tuple[Tensor, Tensor | None]]
) -> None:
    torch.manual_seed(2)
    batch, kv_heads, keys, dim = 5, 3, 32, 16
    query = torch.randn(batch, kv_heads, groups, dim)
    key, value = torch.randn(batch, keys, kv_heads, dim), torch.randn(batch, keys, kv_heads, dim)
    seen = torch.rand(batch, 1, keys) < 0.7
    mask = torch.zeros(batch, 1, keys).masked_fill(~seen, -torch.inf)
    sinks = SINKS[:, :groups]
    output, log_sum = attend(query, key, value, mask, scale=SCALE, softcap=softcap, with_log_sum=with_sinks)
    if with_sinks:
        assert log_sum is not None
        output = fade(output, log_sum, sinks)
    for row in range(batch):
        expected = by_formula(
            query[row].flatten(0, 1).unsqueeze(1),
            key[row].transpose(0, 1).repeat_interleave(groups, 0),
            value[row].transpose(0, 1).repeat_interleave(groups, 0),
            seen[row],
            softcap,
            sinks.flatten() if with_sinks else None,
        )
        got = output[row].reshape(1, kv_heads * groups, dim)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
