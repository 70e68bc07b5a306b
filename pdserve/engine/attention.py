"""Attention over the paged KV pool.

The keys and values of a whole flattened batch are written to the pool first; then every row attends to what
its own sequence has there. The modules of transformers' models come here through `paged_attention`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pdserve.engine.attention_plan import (
    PREFILL_TILE_TOKENS,
    AttentionPlan,
    DecodeGroup,
    PrefillTiles,
    QueryTile,
)
from pdserve.engine.kv_pool import KvPool
from pdserve.engine.layer_notices import LayerNotices
from pdserve.engine.tile_attention import attend_chunk, attend_rows, attend_rows_by_head, fade, merge

ATTENTION_NAME = "pdserve_paged"
_STATE = "_pdserve_attention"
_WIDEST_ALL_HEADS = 768
"""Up to this many elements of all KV heads of a token, decoding in bfloat16 is faster by `attend_rows`
(measured with 1 to 8 query heads per KV head on AVX-512; float32 is faster head by head)."""


class PagedAttention:
    """What the attention layers of one model share: its pool, and the plan of the step that runs."""

    def __init__(self, pool: KvPool) -> None:
        layout = pool.layout
        self.plan: AttentionPlan | None = None
        self.notices = LayerNotices(layout.num_layers, pool.tensor.device)
        # One row per token: [num_blocks * num_layers * 2 * block_size, num_kv_heads * head_dim]
        self._token_rows = pool.tensor.view(-1, layout.num_kv_heads * layout.head_dim)
        # One row per block, layer and key or value: [num_blocks * num_layers * 2, elements]
        self._block_rows = pool.tensor.view(pool.num_blocks * layout.num_layers * 2, -1)
        self._buffers = self._block_rows.new_empty(2, 0, self._block_rows.shape[1])
        self._layout = layout

    def attach(self, model: nn.Module) -> None:
        """Let every attention module of `model` find this object."""
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                object.__setattr__(module, _STATE, self)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store key and value [T, num_kv_heads, head_dim] where the plan says; rows that only pad the batch
        are left out."""
        assert self.plan is not None
        size = self._layout.block_size
        rows = self.plan.write_rows + layer * 2 * size
        count = len(rows)
        self._token_rows.index_copy_(0, rows, key[:count].reshape(count, -1))
        self._token_rows.index_copy_(0, rows + size, value[:count].reshape(count, -1))
        self.notices.written(layer)

    def attend(
        self,
        layer: int,
        query: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """What every row of `query` [T, heads, head_dim] gets from its sequence; zero for rows that only pad
        the batch. sinks: [heads], logits that take part in the softmax and have no value (gpt-oss)."""
        assert self.plan is not None
        call = _LayerCall(self, layer, query, scale, softcap, sinks)
        output = query.new_zeros(query.shape)
        if self.plan.num_decode_rows:
            for group in self.plan.decode_groups(window):
                output[group.rows] = call.decode(group)
        for chunk in self.plan.prefill_tiles(window):
            output[chunk.first_row : chunk.first_row + chunk.length] = call.prefill(chunk)
        return output

    def gather(self, layer: int, key_rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, tokens, num_kv_heads, head_dim] of the blocks at `key_rows`.

        They lie in buffers that the next call uses again: fresh memory of this size comes from the kernel
        page by page, which takes ten times as long as the copy.
        """
        rows = key_rows + 2 * layer
        shape = (batch, -1, self._layout.num_kv_heads, self._layout.head_dim)
        key_buffer, value_buffer = self._buffers_for(len(rows))
        torch.index_select(self._block_rows, 0, rows, out=key_buffer)
        torch.index_select(self._block_rows, 0, rows + 1, out=value_buffer)
        return key_buffer.view(shape), value_buffer.view(shape)

    def _buffers_for(self, num_rows: int) -> tuple[Tensor, Tensor]:
        if num_rows > self._buffers.shape[1]:
            self._buffers = self._block_rows.new_empty(2, num_rows, self._block_rows.shape[1])
        return self._buffers[0, :num_rows], self._buffers[1, :num_rows]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the pool, with the signature of transformers' attention functions.

    query: [1, heads, T, head_dim]; key and value: [1, num_kv_heads, T, head_dim]. Returns
    ([1, T, heads, head_dim], None). Masks are not used: the plan knows what each row sees.
    """
    state: PagedAttention = getattr(module, _STATE)
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    state.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = state.attend(layer, query[0].transpose(0, 1), scale, sliding_window, softcap, s_aux)
    return output.unsqueeze(0), None


class _LayerCall:
    """One layer's attention in one step."""

    def __init__(
        self,
        state: PagedAttention,
        layer: int,
        query: Tensor,  # [T, heads, head_dim]
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        self._state = state
        self._layer = layer
        self._query = query
        self._scale = scale
        self._softcap = softcap
        self._sinks = sinks

    def decode(self, group: DecodeGroup) -> Tensor:
        """[rows, heads, head_dim] of the group's rows. Query heads that share a KV head are the rows of one
        small matrix, so no key is read twice."""
        key, value = self._state.gather(self._layer, group.key_rows, group.size)
        kv_heads, head_dim = key.shape[2:]
        query = self._query[group.rows].reshape(group.size, kv_heads, -1, head_dim)
        # The model alone decides which way is taken, so that a row's result never depends on the batch.
        narrow = kv_heads * head_dim <= _WIDEST_ALL_HEADS
        all_heads = query.dtype == torch.bfloat16 and narrow and query.device.type == "cpu"
        output, log_sum = (attend_rows if all_heads else attend_rows_by_head)(
            query,
            key,
            value,
            group.mask,
            scale=self._scale,
            softcap=self._softcap,
            with_log_sum=self._sinks is not None,
        )
        if self._sinks is not None:
            assert log_sum is not None
            output = fade(output, log_sum, self._sinks.view(kv_heads, -1))
        return output.reshape(group.size, -1, head_dim)

    def prefill(self, chunk: PrefillTiles) -> Tensor:
        """[length, heads, head_dim] of one chunk."""
        gathered = self._state.gather(self._layer, chunk.key_rows, 1)
        key, value = (states[0].transpose(0, 1).contiguous() for states in gathered)
        kv_heads, _, head_dim = key.shape
        query = self._query.index_select(0, chunk.query_rows)
        # [tiles, kv_heads, groups, rows of a tile, head_dim]
        by_tile = query.view(-1, PREFILL_TILE_TOKENS, kv_heads, query.shape[1] // kv_heads, head_dim)
        by_tile = by_tile.permute(0, 2, 3, 1, 4)
        outputs = [
            self._query_tile(tile, rows, key, value, chunk.key_start)
            for tile, rows in zip(chunk.tiles, by_tile, strict=True)
        ]
        whole = torch.stack(outputs).permute(0, 3, 1, 2, 4).reshape(query.shape)
        return whole[chunk.first_slot : chunk.first_slot + chunk.length]

    def _query_tile(
        self, tile: QueryTile, query: Tensor, key: Tensor, value: Tensor, key_start: int
    ) -> Tensor:
        """One tile of query rows [kv_heads, groups, rows, head_dim] over all that it sees."""
        whole = len(tile.parts) == 1 and self._sinks is None
        parts = [
            attend_chunk(
                query,
                key[:, part.start - key_start : part.stop - key_start],
                value[:, part.start - key_start : part.stop - key_start],
                part.mask,
                scale=self._scale,
                softcap=self._softcap,
                with_log_sum=not whole,
            )
            for part in tile.parts
        ]
        return parts[0][0] if whole else self._combine(parts)

    def _combine(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        log_sums = torch.stack([log_sum for _, log_sum in parts if log_sum is not None])
        output = merge(torch.stack([output for output, _ in parts]), log_sums)
        if self._sinks is None:
            return output
        sinks = self._sinks.view(output.shape[0], -1, 1)
        return fade(output, torch.logsumexp(log_sums, dim=0), sinks)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The plan replaces all masks."""


AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
