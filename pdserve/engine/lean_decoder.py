"""The forward pass of Llama-like models on a CPU, without the modules of transformers.

Between the matrix products of a decode step lie some forty small operators a layer, each a few microseconds
that no core spends reading weights. This pass says the same with about twenty: queries and keys are rotated
together, residuals are added inside the products, nothing is transposed. The last layer goes on only for the
rows whose logits are wanted. Whether it computes what the model computes is checked at load (`self_check`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdserve.engine.attention import PagedAttention
from pdserve.engine.attention_probe import AttentionShape
from pdserve.engine.packed_linear import MIN_ROWS, PackedLinear, fused_linear

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Decoder layers of one form: pre-norm, rotary attention, residual, pre-norm, gated MLP, residual."""


class Rotation(NamedTuple):
    """Rotary embedding of a step's positions, each [T, 1, head_dim] (Su et al. 2021, arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor  # the first half negative: it multiplies the vector with its halves swapped


class LeanDecoder:
    """Implements the forward pass over a model whose linear layers are packed."""

    def __init__(self, model: Any, shape: AttentionShape, attention: PagedAttention) -> None:
        decoder = model.model
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [_Layer(index, layer, shape, attention) for index, layer in enumerate(decoder.layers)]
        self._norm = _RmsNorm(decoder.norm)
        self._head: PackedLinear = model.lm_head

    @classmethod
    def find(cls, model: Any, shape: AttentionShape, attention: PagedAttention) -> "LeanDecoder | None":
        """The lean pass of `model` if it has one: the layers have the common form, are packed, and rotate
        whole heads."""
        if model.config.model_type not in _MODEL_TYPES or not isinstance(model.lm_head, PackedLinear):
            return None
        positions = torch.zeros(1, 1, dtype=torch.int64)
        cos, _ = model.model.rotary_emb(model.model.embed_tokens(positions), positions)
        return cls(model, shape, attention) if cos.shape[-1] == shape.head_dim else None

    def logits(self, token_ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """token_ids and positions: int64 [T], T >= MIN_ROWS; keep: int64 [n], rows whose logits are wanted.
        Returns [n, vocab]. Every row's keys and values are in the pool afterwards."""
        states: Tensor = self._embed(token_ids)
        rotation = self._rotate(states, positions)
        for layer in self._layers[:-1]:
            states = layer.finish(states, layer.attend(layer.project(states, rotation)))
        last = self._layers[-1]
        query = last.project(states, rotation)
        if not len(keep):
            return states.new_empty(0, self._head.out_features)
        rows = nn.functional.pad(keep, (0, max(0, MIN_ROWS - len(keep))))
        states = last.finish(states[rows], last.attend(query)[rows])
        logits: Tensor = self._head(self._norm(states))
        return logits[: len(keep)]

    def _rotate(self, states: Tensor, positions: Tensor) -> Rotation:
        cos, sin = self._rotary(states, positions.unsqueeze(0))
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return Rotation(cos[0].unsqueeze(1), sin[0].unsqueeze(1))


class _Layer:
    """One decoder layer. T is the number of rows of the batch, H that of a token's features."""

    def __init__(self, index: int, layer: Any, shape: AttentionShape, attention: PagedAttention) -> None:
        own = layer.self_attn
        self._index = index
        self._shape = shape
        self._attention = attention
        self._window = shape.windows[index]
        self._scale: float = own.scaling
        self._input_norm = _RmsNorm(layer.input_layernorm)
        self._qkv = fused_linear(own, "q_proj")
        self._head_norm = _head_norm(own, shape)
        self._out: PackedLinear = own.o_proj
        self._mlp_norm = _RmsNorm(layer.post_attention_layernorm)
        self._gate_up = fused_linear(layer.mlp, "gate_proj")
        self._activation: Callable[[Tensor], Tensor] = layer.mlp.act_fn
        self._down: PackedLinear = layer.mlp.down_proj

    def project(self, states: Tensor, rotation: Rotation) -> Tensor:
        """states: [T, H]. Writes keys and values to the pool; returns queries [T, heads, head_dim]."""
        heads, kv_heads = self._shape.num_heads, self._shape.num_kv_heads
        fused = self._qkv.apply_rows(self._input_norm(states))
        by_head = fused.view(len(states), heads + 2 * kv_heads, self._shape.head_dim)
        turning = by_head[:, : heads + kv_heads]
        if self._head_norm is not None:
            turning = self._head_norm(turning)
        swapped = torch.roll(turning, self._shape.head_dim // 2, dims=-1)
        turned = torch.mul(turning, rotation.cos).addcmul_(swapped, rotation.sin)
        self._attention.write(self._index, turned[:, heads:], by_head[:, heads + kv_heads :])
        return turned[:, :heads]

    def attend(self, query: Tensor) -> Tensor:
        """[T, heads, head_dim] -> [T, heads * head_dim]"""
        return self._attention.attend(self._index, query, self._scale, self._window).flatten(1)

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [n, H] of any n of its rows: its input and what attention gave them."""
        states = self._out.add_rows(attended, states)
        gate, up = self._gate_up.apply_rows(self._mlp_norm(states)).chunk(2, dim=-1)
        return self._down.add_rows(self._activation(gate).mul_(up), states)


class _RmsNorm:
    """Zhang and Sennrich 2019, arXiv 1910.07467; in float32 and rounded where the models round."""

    def __init__(self, module: Any, weight: Tensor | None = None) -> None:
        self._weight = module.weight.detach() if weight is None else weight
        self._epsilon = torch.tensor([module.variance_epsilon])
        self._share = 1 / module.weight.shape[-1]

    def __call__(self, states: Tensor) -> Tensor:
        """[..., n], n features of a token or head."""
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=self._share).rsqrt_()
        out = torch.empty(states.shape, dtype=states.dtype)
        return torch.mul(states, scale, out=out).mul_(self._weight)


def _head_norm(attention: Any, shape: AttentionShape) -> _RmsNorm | None:
    """The norms of queries and keys as one with a weight of its own for every head."""
    if not hasattr(attention, "q_norm"):
        return None
    parts = ((attention.q_norm, shape.num_heads), (attention.k_norm, shape.num_kv_heads))
    weights = [norm.weight.detach().expand(count, -1) for norm, count in parts]
    return _RmsNorm(attention.q_norm, torch.cat(weights))
