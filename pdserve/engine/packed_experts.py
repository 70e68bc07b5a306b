"""Experts of a mixture, computed expert by expert on rows sorted by expert."""

from typing import Any

import torch
from torch import Tensor, nn

from pdserve.engine.packed_linear import PackedLinear, find_packed_ops

_PLAIN_FORM = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


def pack_experts(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the expert collections of a CPU model in place where their form is the common one: weights
    [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate], no biases. Returns how many."""
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _has_plain_form(child):
                setattr(parent, name, PackedExperts(child, dtype))
                packed += 1
    return packed


class PackedExperts(nn.Module):
    """Stands for a collection of experts; takes its weights over."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        super().__init__()
        ops = find_packed_ops(dtype)
        self._apply_gate = experts._apply_gate
        self._gate_up = nn.ModuleList(PackedLinear(weight, None, ops) for weight in experts.gate_up_proj)
        self._down = nn.ModuleList(PackedLinear(weight, None, ops) for weight in experts.down_proj)
        del experts.gate_up_proj, experts.down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; index and weights: [tokens, k]. Returns [tokens, hidden].

        A token's k results are summed in the order of its own choice, so its neighbours cannot change it.
        """
        choices = top_k_index.shape[1]
        order = torch.argsort(top_k_index.flatten(), stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self._gate_up)).tolist()
        inputs = hidden_states.index_select(0, order // choices)
        results = [
            down(self._apply_gate(gate_up(rows)))
            for rows, gate_up, down in zip(
                torch.split(inputs, counts), self._gate_up, self._down, strict=True
            )
            if len(rows)
        ]
        outputs = torch.empty_like(inputs)
        outputs[order] = torch.cat(results)
        weighted = outputs.view(len(hidden_states), choices, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)


def _has_plain_form(module: Any) -> bool:
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights) and all(
        getattr(module, key, None) == value for key, value in _PLAIN_FORM.items()
    )
