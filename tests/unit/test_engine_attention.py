"""Attention by tiles against the formula written out in float64."""

import pytest
import torch
from torch import Tensor

from pdserve.engine.tile_attention import attend, attend_all_heads, merge

SCALE = 0.3


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


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0])])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_tiles", [1, 4])
def test_merged_tiles_are_the_whole(num_tiles: int, softcap: float | None, sinks: Tensor | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 16), torch.randn(3, 64, 16), torch.randn(3, 64, 16)
    parts = [
        attend(query[None], k[None], v[None], None, causal=False, scale=SCALE, softcap=softcap)
        for k, v in zip(key.chunk(num_tiles, 1), value.chunk(num_tiles, 1), strict=True)
    ]
    outputs = torch.stack([output[0] for output, _ in parts]).permute(2, 0, 1, 3)
    log_sums = torch.stack([log_sum[0] for _, log_sum in parts]).permute(2, 0, 1)
    expected = by_formula(query, key, value, torch.ones(6, 64, dtype=torch.bool), softcap, sinks)
    torch.testing.assert_close(merge(outputs, log_sums, sinks).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_and_masked_rows(softcap: float | None) -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 8, 16), torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    expected = by_formula(query, key, value, seen, softcap, None)
    mask = torch.zeros(8, 8).masked_fill(~seen, -torch.inf)
    for causal, explicit in ((True, None), (False, mask[None, None])):
        output, _ = attend(
            query[None], key[None], value[None], explicit, causal=causal, scale=SCALE, softcap=softcap
        )
        torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_all_heads_at_once_is_head_by_head(softcap: float | None) -> None:
    torch.manual_seed(2)
    tiles, kv_heads, groups, keys, dim = 5, 3, 2, 32, 16
    query = torch.randn(tiles, kv_heads, groups, dim)
    key, value = torch.randn(tiles, keys, kv_heads, dim), torch.randn(tiles, keys, kv_heads, dim)
    mask = torch.zeros(tiles, 1, 1, keys).masked_fill(torch.rand(tiles, 1, 1, keys) < 0.3, -torch.inf)
    output, log_sum = attend_all_heads(query, key, value, mask, scale=SCALE, softcap=softcap)
    by_head = attend(
        query, key.transpose(1, 2), value.transpose(1, 2), mask, causal=False, scale=SCALE, softcap=softcap
    )
    torch.testing.assert_close(output, by_head[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sum, by_head[1], rtol=1e-5, atol=1e-5)
