"""Attention of query rows over one tile of keys, and the merging of tiles.

A row's attention over many tiles is computed tile by tile; each tile gives an output and the log of the
sum of its exponentiated scores, and a weighted sum of the tiles is the whole (Rabe and Staats 2021,
arXiv 2112.05682; Dao et al. 2023, Flash-Decoding). Tiles lie at fixed multiples of positions, so what is
computed for a row, in which order and with which shapes depends on nothing but the row's own position.
"""

import math

import torch
from torch import Tensor

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    query: [batch, heads, rows, head_dim]; key and value: [batch, heads, keys, head_dim]; mask: broadcastable
    to [batch, heads, rows, keys], zero or minus infinity, dtype of query; `causal` lets row i see keys
    0 to i. Returns [batch, heads, rows, head_dim] in query's dtype and [batch, heads, rows] in float32.
    What a row gets that sees no key is undefined: callers overwrite it.
    """
    if softcap is None and query.device.type == "cpu":
        output, log_sum = _flash_on_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return output, log_sum
    return _attend_by_matmul(query, key, value, mask, causal, scale, softcap)


def attend_all_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The same for the few rows of decode steps, all heads of a tile in two matrix products.

    Each query is laid out over the width of all KV heads, zero outside its own. The zeros cost arithmetic
    and save what is scarce: keys and values are read as they lie, in one piece, whole tiles at a time.
    query: [batch, kv_heads, groups, head_dim]; key and value: [batch, keys, kv_heads, head_dim]; mask:
    [batch, 1, 1, keys]; every row sees some key. Returns what `attend` does.
    """
    batch, kv_heads, groups, head_dim = query.shape
    wide = query.new_zeros(batch, kv_heads, groups, kv_heads, head_dim)
    wide.diagonal(dim1=1, dim2=3).copy_(query.permute(0, 2, 3, 1))
    scores = torch.bmm(wide.view(batch, kv_heads * groups, -1), key.flatten(2).transpose(1, 2))
    if softcap is None:
        scores = torch.add(mask[:, 0].float(), scores, alpha=scale)
    else:
        scores = _cap(scores.float() * scale, softcap) + mask[:, 0]
    weights = torch.softmax(scores, dim=-1)
    # The largest weight is exp(largest score - log-sum-exp): cheaper than a second pass of exponentials.
    log_sum = scores.amax(dim=-1) - weights.amax(dim=-1).log()
    output = torch.bmm(weights.to(value.dtype), value.flatten(2))
    own = output.view(batch, kv_heads, groups, kv_heads, head_dim).diagonal(dim1=1, dim2=3)
    return own.permute(0, 3, 1, 2), log_sum.view(batch, kv_heads, groups)


def merge(outputs: Tensor, log_sums: Tensor, sinks: Tensor | None) -> Tensor:
    """Merge the tiles of rows.

    outputs: [rows, tiles, heads, head_dim]; log_sums: float32 [rows, tiles, heads], minus infinity for a tile
    that is not there; sinks: [heads], logits that take part in the softmax and have no value (gpt-oss), or
    None. Returns [rows, heads, head_dim] in the dtype of `outputs`.
    """
    if sinks is not None:
        # One more tile of which only the weight counts.
        sink = sinks.float().expand(len(log_sums), 1, -1)
        weights = torch.softmax(torch.cat([sink, log_sums], dim=1), dim=1)[:, 1:]
    else:
        weights = torch.softmax(log_sums, dim=1)
    return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(outputs.dtype)


def _attend_by_matmul(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    scores = _cap(scores, softcap)
    if mask is not None:
        scores = scores + mask
    if causal:
        rows, keys = scores.shape[-2:]
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(hidden, -math.inf)
    log_sum = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - log_sum.unsqueeze(-1)).to(value.dtype)
    return torch.matmul(weights, value), log_sum


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
