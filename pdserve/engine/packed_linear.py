"""Linear layers with weights laid out once for the CPU's matrix kernels.

oneDNN reorders a plain weight on every call; laid out in advance, decoding small batches takes about half
the time. Projections of the same input become one product. The original weights are dropped.

With one or a few rows some kernels sum in another order than with many, so rows are padded to a least
number: then a row's result does not depend on how many rows are computed with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that take the same input in the models of transformers."""
MIN_ROWS = 4
"""From this many rows on, a row's result does not depend on how many there are: measured with float32 and
bfloat16 on AVX-512, packed and plain; checked at load by `pdserve.engine.self_check`."""
_EXPECTED_ROWS = 32
"""Batch size that the layout is chosen for; it serves other sizes as well."""


@dataclass(frozen=True, slots=True)
class PackedOps:
    """torch's private names for prepacked linear layers."""

    reorder: Any
    linear: Any
    linear_binary: Any


def pack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the linear layers of a CPU model in place. Returns how many weights were laid out."""
    ops = find_packed_ops(dtype)
    packed = 0
    for parent in list(model.modules()):
        for names in _SIBLINGS:
            siblings = [getattr(parent, name, None) for name in names]
            if _share_input(siblings):
                _fuse(parent, names, siblings, ops)  # type: ignore[arg-type]
                packed += 1
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(parent, name, PackedLinear(*_weight_and_bias(child), ops))
                packed += 1
    return packed


def fused_linear(parent: nn.Module, name: str) -> "PackedLinear":
    """The one layer that stands for the projection `name` of `parent` and its siblings, in their order."""
    part = getattr(parent, name)
    assert isinstance(part, _FusedPart)
    return part.shared.linear


class PackedLinear(nn.Module):
    """Stands for an nn.Linear or Conv1D. `weight` is [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: PackedOps | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._ops = ops
        self._bias = None if bias is None else bias.detach()
        self._weight = weight.detach()
        if ops is not None:
            self._weight = ops.reorder(self._weight.contiguous(), _EXPECTED_ROWS)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = states.reshape(-1, self.in_features)
        if not len(rows):
            return states.new_empty(*states.shape[:-1], self.out_features)
        output = self.apply_rows(_pad_rows(rows))[: len(rows)]
        return output.view(*states.shape[:-1], self.out_features)

    def apply_rows(self, rows: Tensor) -> Tensor:
        """[n, in] -> [n, out], n >= MIN_ROWS."""
        if self._ops is None:
            return nn.functional.linear(rows, self._weight, self._bias)
        output: Tensor = self._ops.linear(rows, self._weight, self._bias, "none", [], "")
        return output

    def add_rows(self, rows: Tensor, residual: Tensor) -> Tensor:
        """The same plus `residual` [n, out], rounded once."""
        if self._ops is None:
            return residual + nn.functional.linear(rows, self._weight, self._bias)
        output: Tensor = self._ops.linear_binary(rows, residual, self._weight, self._bias, "add")
        return output


class _FusedPart(nn.Module):
    """One of several projections of the same input. The first one asked computes all."""

    def __init__(self, shared: "_SharedProjection", index: int) -> None:
        super().__init__()
        self._index = index
        self.shared = shared

    def forward(self, states: Tensor) -> Tensor:
        return self.shared.part(states, self._index)


class _SharedProjection:
    """Computes projections of one input together and hands them out one by one."""

    def __init__(self, linear: PackedLinear, sizes: Sequence[int]) -> None:
        self.linear = linear
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, states: Tensor, index: int) -> Tensor:
        if self._input is not states or index not in self._parts:
            self._input = states
            self._parts = dict(enumerate(self.linear(states).split(self._sizes, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part


def _fuse(
    parent: nn.Module, names: Sequence[str], siblings: Sequence[nn.Linear], ops: PackedOps | None
) -> None:
    weight = torch.cat([linear.weight.detach() for linear in siblings])
    biases = [linear.bias.detach() for linear in siblings if linear.bias is not None]
    shared = _SharedProjection(
        PackedLinear(weight, torch.cat(biases) if biases else None, ops),
        [linear.out_features for linear in siblings],
    )
    for index, name in enumerate(names):
        setattr(parent, name, _FusedPart(shared, index))


def _share_input(siblings: Sequence[Any]) -> bool:
    return (
        all(type(linear) is nn.Linear for linear in siblings)
        and len({(linear.in_features, linear.bias is None, linear.weight.dtype) for linear in siblings}) == 1
    )


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(linear, Conv1D):
        return linear.weight.t().contiguous(), linear.bias
    return linear.weight, linear.bias


def _pad_rows(rows: Tensor) -> Tensor:
    missing = MIN_ROWS - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[:1].expand(missing, -1)])


def find_packed_ops(dtype: torch.dtype) -> PackedOps | None:
    """The packed operators if this build of torch has them for `dtype` on this CPU."""
    mkldnn = getattr(torch.ops, "mkldnn", None)
    reorder = getattr(mkldnn, "_reorder_linear_weight", None)
    linear = getattr(mkldnn, "_linear_pointwise", None)
    linear_binary = getattr(linear, "binary", None)
    if reorder is None or linear is None or linear_binary is None:
        return None
    ops = PackedOps(reorder, linear, linear_binary)
    return ops if _works(ops, dtype) else None


def _works(ops: PackedOps, dtype: torch.dtype) -> bool:
    unit = torch.eye(16, dtype=dtype)
    try:
        packed = ops.reorder(unit, 16)
        plain = ops.linear(unit, packed, None, "none", [], "")
        added = ops.linear_binary(unit, unit, packed, None, "add")
    except RuntimeError:  # this build or CPU has no such kernel
        return False
    return bool(torch.equal(plain, unit) and torch.equal(added, 2 * unit))
