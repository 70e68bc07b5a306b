"""Finding out what a model's attention needs by running it once on a few tokens and listening."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pdserve.contract.errors import ModelUnsupported

_PROBE_NAME = "pdserve_probe"
_PROBE_TOKENS = 4
_CALLS = "_pdserve_probe_calls"
_UNKNOWN_NEEDS = ("position_bias", "alibi", "attention_bias", "block_mask")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the layers of a model have in common, and the window of each."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    layer: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    window: int | None
    needs: tuple[str, ...]


def probe_attention(name: str, model: nn.Module, config: Any) -> AttentionShape:
    """Listen to one forward pass. Raises ModelUnsupported when the attention cannot be served: not called
    through AttentionInterface, layers of different shapes, keys and values of different sizes, biases."""
    calls = _listen(model)
    kind = config.model_type
    num_layers = config.num_hidden_layers
    if sorted(call.layer for call in calls) != list(range(num_layers)):
        raise _refusal(name, kind, "attention or recurrent layers that do not go through AttentionInterface")
    first = calls[0]
    if any((call.query, call.key, call.value) != (first.query, first.key, first.value) for call in calls):
        raise _refusal(name, kind, "layers with KV heads of different shapes")
    if first.key != first.value or first.query[3] != first.key[3]:
        raise _refusal(name, kind, "keys and values of different sizes (latent attention)")
    needs = sorted({need for call in calls for need in call.needs})
    if needs:
        raise _refusal(name, kind, f"attention with {', '.join(needs)}")
    windows = tuple(call.window for call in sorted(calls, key=lambda call: call.layer))
    if _wants_window(config) and set(windows) == {None}:
        raise _refusal(name, kind, "a sliding window that it does not pass to its attention function")
    return AttentionShape(num_layers, first.query[1], first.key[1], first.key[3], windows)


def _listen(model: Any) -> list[_Call]:
    calls: list[_Call] = []
    modules = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    for module in modules:
        object.__setattr__(module, _CALLS, calls)
    model.set_attn_implementation(_PROBE_NAME)
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=model.device)
    positions = torch.arange(_PROBE_TOKENS, device=model.device).unsqueeze(0)
    with torch.inference_mode():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    model.set_attn_implementation("eager")
    for module in modules:
        object.__delattr__(module, _CALLS)
    return calls


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Notes what it is asked and answers with zeros of the right shape."""
    calls: list[_Call] = getattr(module, _CALLS)
    needs = tuple(need for need in _UNKNOWN_NEEDS if kwargs.get(need) is not None)
    shapes = (tuple(query.shape), tuple(key.shape), tuple(value.shape))
    layer: int = module.layer_idx  # type: ignore[assignment]
    calls.append(_Call(layer, *shapes, sliding_window, needs))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _wants_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _refusal(name: str, kind: str, need: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"model {name!r} ({kind}) is not supported: it needs {need}, which pdserve does not have"
    )


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No layer looks at a mask during the probe."""


AttentionInterface.register(_PROBE_NAME, _record)
AttentionMaskInterface.register(_PROBE_NAME, _no_mask)
