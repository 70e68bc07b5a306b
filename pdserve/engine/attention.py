"""The attention function that transformers' models call: it reads and writes the paged KV pool.

Models hand over the query, key and value of a whole flattened batch. The keys and values are written to
the pool first; then every row attends to what its own sequence has in the pool.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pdserve.engine.attention_plan import (
    PREFILL_TILE_TOKENS,
    AttentionPlan,
    DecodeTiles,
    PrefillTiles,
    QueryTile,
)
from pdserve.engine.kv_pool import KvPool
from pdserve.engine.tile_attention import attend, attend_all_heads, merge

ATTENTION_NAME = "pdserve_paged"
_STATE = "_pdserve_attention"
_WIDEST_ALL_HEADS = 768
"""Up to this many elements of all KV heads of a token, decoding in bfloat16 is faster by `attend_all_heads`
(measured with 1 to 8 query heads per KV head on AVX-512; float32 is faster head by head)."""


class PagedAttention:
    """What the attention modules of one model share: its pool, and the plan of the step that runs."""

    def __init__(self, pool: KvPool) -> None:
        layout = pool.layout
        self.plan: AttentionPlan | None = None
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
        """Store key and value [1, num_kv_heads, T, head_dim] where the plan says."""
        assert self.plan is not None
        size = self._layout.block_size
        rows = self.plan.write_rows + layer * 2 * size
        self._token_rows.index_copy_(0, rows, _by_token(key, len(rows)))
        self._token_rows.index_copy_(0, rows + size, _by_token(value, len(rows)))

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
    assert state.plan is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    state.write(layer, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = _LayerCall(state, layer, query[0].transpose(0, 1), scale, softcap, s_aux)
    # Rows that only pad the batch stay zero.
    output = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
    if state.plan.num_decode_rows:
        output[: state.plan.num_decode_rows] = call.decode(state.plan.decode_tiles(sliding_window))
    for chunk in state.plan.prefill_tiles(sliding_window):
        output[chunk.first_row : chunk.first_row + chunk.length] = call.prefill(chunk)
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

    def decode(self, tiles: DecodeTiles) -> Tensor:
        """[rows, heads, head_dim] of the decode rows. Query heads that share a KV head are the rows of one
        small matrix, so no key is read twice."""
        key, value = self._state.gather(self._layer, tiles.key_rows, len(tiles.row_of_tile))
        num_tiles, _, kv_heads, head_dim = key.shape
        query = self._query[: tiles.num_rows].reshape(tiles.num_rows, kv_heads, -1, head_dim)
        output, log_sum = self._attend_decode(query, tiles, key, value)
        output = output.reshape(num_tiles, -1, head_dim)
        log_sum = log_sum.reshape(num_tiles, -1)
        return torch.cat(
            [self._merge_rows(part.tiles, part.absent, output, log_sum) for part in tiles.merges]
        )

    def _attend_decode(
        self, query: Tensor, tiles: DecodeTiles, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[tiles, kv_heads, groups, head_dim] and log-sum-exp. The model alone decides which way is taken, so
        that a row's result never depends on the batch."""
        kv_heads, groups, head_dim = query.shape[1:]
        narrow = kv_heads * head_dim <= _WIDEST_ALL_HEADS
        if query.dtype == torch.bfloat16 and narrow and query.device.type == "cpu":
            query = query.index_select(0, tiles.row_of_tile)
            return attend_all_heads(query, key, value, tiles.mask, scale=self._scale, softcap=self._softcap)
        query = _pad_groups(query).index_select(0, tiles.row_of_tile)
        output, log_sum = self._attend(query, key.transpose(1, 2), value.transpose(1, 2), tiles.mask)
        return output[:, :, :groups], log_sum[:, :, :groups]

    def _merge_rows(self, tiles: Tensor, absent: Tensor, output: Tensor, log_sum: Tensor) -> Tensor:
        if tiles.shape[1] == 1 and self._sinks is None:
            return output.index_select(0, tiles[:, 0])
        picked = log_sum[tiles].masked_fill_(absent, -torch.inf)
        return merge(output[tiles], picked, self._sinks)

    def prefill(self, chunk: PrefillTiles) -> Tensor:
        """[length, heads, head_dim] of one chunk."""
        gathered = self._state.gather(self._layer, chunk.key_rows, 1)
        key, value = (states.transpose(1, 2) for states in gathered)
        query = self._query.index_select(0, chunk.query_rows)
        size = PREFILL_TILE_TOKENS
        parts = [
            self._query_tile(tile, query[index * size : (index + 1) * size], key, value, chunk.key_start)
            for index, tile in enumerate(chunk.tiles)
        ]
        return torch.cat(parts)[chunk.first_slot : chunk.first_slot + chunk.length]

    def _query_tile(
        self, tile: QueryTile, query: Tensor, key: Tensor, value: Tensor, key_start: int
    ) -> Tensor:
        """One tile of query rows [tile, heads, head_dim] over its own keys and the past before it."""
        size, heads, head_dim = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        start = tile.start - key_start
        own = slice(start, start + size)
        by_head = query.transpose(0, 1).unsqueeze(0)
        output, log_sum = self._attend(
            by_head,
            _repeat_heads(key[:, :, own], groups),
            _repeat_heads(value[:, :, own], groups),
            tile.self_mask,
            causal=tile.self_mask is None,
        )
        outputs, log_sums = [output[0]], [log_sum[0]]
        if tile.start > tile.past_start:
            past = slice(tile.past_start - key_start, start)
            grouped = by_head.reshape(1, kv_heads, groups * size, head_dim)
            output, log_sum = self._attend(grouped, key[:, :, past], value[:, :, past], tile.past_mask)
            if tile.past_unseen is not None:
                output = output.masked_fill(tile.past_unseen[:, None], 0.0)
                log_sum = log_sum.masked_fill(tile.past_unseen, -torch.inf)
            outputs.append(output.reshape(heads, size, head_dim))
            log_sums.append(log_sum.reshape(heads, size))
        elif self._sinks is None:
            return outputs[0].transpose(0, 1)
        stacked = torch.stack(outputs).permute(2, 0, 1, 3)
        return merge(stacked, torch.stack(log_sums).permute(2, 0, 1), self._sinks)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        return attend(query, key, value, mask, causal=causal, scale=self._scale, softcap=self._softcap)


def _by_token(states: Tensor, count: int) -> Tensor:
    """The first `count` tokens of [1, num_kv_heads, T, head_dim] as [count, num_kv_heads * head_dim]."""
    return states[0, :, :count].transpose(0, 1).reshape(count, -1)


def _pad_groups(query: Tensor) -> Tensor:
    """Rows of a KV head, 1 and 3 made even: measured, matrix products of 1 and 3 rows sum in an order that
    depends on how their buffer is aligned, which differs between threads."""
    groups = query.shape[2]
    return nn.functional.pad(query, (0, 0, 0, 1)) if groups in (1, 3) else query


def _repeat_heads(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The plan replaces all masks."""


AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
