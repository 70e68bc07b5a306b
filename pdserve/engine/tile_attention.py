"""Attention as plain matrix products over keys that lie in one piece, and the merging of parts.

torch's own fused kernel for CPUs takes two to three times as long in bfloat16; it is used for float32 decode
steps, where it is the faster one (measured on AVX-512). What is computed for a row, in which order and with
which shapes must depend on nothing but the row's own position: callers see to it (`attention_plan`).
"""

import torch
from torch import Tensor

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    with_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of consecutive positions.

    query: [kv_heads, groups, rows, head_dim]; key and value: [kv_heads, keys, head_dim]; mask: [rows, n],
    zero or minus infinity for the last n keys, or None; every row sees some key. Returns [kv_heads, groups,
    rows, head_dim] in value's dtype and, if asked for, the log of the sum of exponentiated scores, float32
    [kv_heads, groups, rows].
    """
    kv_heads, groups, rows, head_dim = query.shape
    scores = torch.bmm(query.reshape(kv_heads, groups * rows, head_dim), key.transpose(1, 2))
    scores = _scale_and_cap(scores, scale, softcap).view(kv_heads, groups, rows, -1)
    if mask is not None:
        scores[..., -mask.shape[1] :] += mask
    weights, log_sum = _soften(scores, value.dtype, with_log_sum)
    output = torch.bmm(weights.view(kv_heads, groups * rows, -1), value)
    return output.view(query.shape), log_sum


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    with_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one row of each of several sequences, all heads in two matrix products.

    Each query is laid out over the width of all KV heads, zero outside its own. The zeros cost arithmetic
    and save what is scarce: keys and values are read as they lie, in one piece.
    query: [batch, kv_heads, groups, head_dim]; key and value: [batch, keys, kv_heads, head_dim]; mask:
    [batch, 1, keys], zero or minus infinity; every row sees some key. Returns [batch, kv_heads, groups,
    head_dim] and the log-sum-exp [batch, kv_heads, groups], as `attend_chunk`.
    """
    batch, kv_heads, groups, head_dim = query.shape
    wide = query.new_zeros(batch, kv_heads, groups, kv_heads, head_dim)
    wide.diagonal(dim1=1, dim2=3).copy_(query.permute(0, 2, 3, 1))
    scores = torch.bmm(wide.view(batch, kv_heads * groups, -1), key.flatten(2).transpose(1, 2))
    weights, log_sum = _soften(_scale_and_cap(scores, scale, softcap).add_(mask), value.dtype, with_log_sum)
    output = torch.bmm(weights, value.flatten(2))
    own = output.view(batch, kv_heads, groups, kv_heads, head_dim).diagonal(dim1=1, dim2=3)
    return own.permute(0, 3, 1, 2), None if log_sum is None else log_sum.view(batch, kv_heads, groups)


def attend_rows_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    with_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same as `attend_rows`, head by head.

    A row's bits must not depend on what is beside it, but a single piece of work is cut among threads in
    another way than several (measured), so it is given twice.
    """
    batch, kv_heads, _, _ = query.shape
    key, value, mask = key.transpose(1, 2), value.transpose(1, 2), mask[:, None]
    fused = softcap is None and query.device.type == "cpu"
    if batch == 1 and (kv_heads == 1 or not fused):
        query, key, value, mask = (part.expand(2, -1, -1, -1) for part in (query, key, value, mask))
    if fused:
        output, log_sum = _by_fused_kernel(query, key, value, mask, scale)
    else:
        scores = _scale_and_cap(torch.matmul(query, key.transpose(-1, -2)), scale, softcap).add_(mask)
        weights, log_sum = _soften(scores, value.dtype, with_log_sum)
        output = torch.matmul(weights, value)
    return output[:batch], None if log_sum is None else log_sum[:batch]


def merge(outputs: Tensor, log_sums: Tensor) -> Tensor:
    """Attention over all keys, of attention over parts of them (Rabe and Staats 2021, arXiv 2112.05682).

    outputs: [parts, ..., head_dim]; log_sums: float32 [parts, ...]. Returns [..., head_dim] in the dtype of
    `outputs`.
    """
    weights = torch.softmax(log_sums, dim=0)
    return (outputs * weights.unsqueeze(-1)).sum(dim=0).to(outputs.dtype)


def fade(output: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """Let sinks take part in the softmax: logits that have no value (gpt-oss).

    output: [..., head_dim]; log_sum: float32 [...]; sinks: broadcastable to log_sum.
    """
    return (output * torch.sigmoid(log_sum - sinks.float()).unsqueeze(-1)).to(output.dtype)


def _by_fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Products of 1 and 3 rows sum in an order that depends on how their buffer is aligned, which differs
    between threads (measured): their number is made even. query: [batch, kv_heads, groups, head_dim]."""
    groups = query.shape[2]
    if groups in (1, 3):
        query = torch.nn.functional.pad(query, (0, 0, 0, 1))
    output, log_sum = _flash_on_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    return output[:, :, :groups], log_sum[:, :, :groups]


def _scale_and_cap(scores: Tensor, scale: float, softcap: float | None) -> Tensor:
    """In place where there is no cap; else in float32, since capping loses digits."""
    if softcap is None:
        return scores.mul_(scale)
    return scores.float().mul_(scale / softcap).tanh_().mul_(softcap)


def _soften(scores: Tensor, dtype: torch.dtype, with_log_sum: bool) -> tuple[Tensor, Tensor | None]:
    """The weights in `dtype`, and the log-sum-exp in float32."""
    if not with_log_sum:
        return torch.softmax(scores, dim=-1).to(dtype), None
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    # The largest weight is exp(largest score - log-sum-exp): cheaper than a second pass of exponentials.
    log_sum = scores.amax(dim=-1).float() - weights.amax(dim=-1).log()
    return weights.to(dtype), log_sum
