"""Packed and fused linear layers against torch's own, and rows that do not feel their neighbours."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pdserve.engine.packed_linear import MIN_ROWS, PackedLinear, find_packed_ops, pack_linears

DTYPES = [torch.float32, torch.bfloat16]


class Attention(nn.Module):
    """Projections named as in transformers' models."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 32, bias=bias)
        self.k_proj = nn.Linear(48, 16, bias=bias)
        self.v_proj = nn.Linear(48, 16, bias=bias)
        self.o_proj = Conv1D(48, 32)

    def forward(self, states: Tensor) -> Tensor:
        mixed = self.q_proj(states) * torch.cat([self.k_proj(states), self.v_proj(states)], dim=-1)
        return self.o_proj(mixed)  # type: ignore[no-any-return]


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_computes_the_same(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    model = Attention(bias).to(dtype)
    states = torch.randn(1, 9, 48, dtype=dtype)
    expected = model(states)
    assert pack_linears(model, dtype) == 2  # one for the three that share an input, one for the other
    torch.testing.assert_close(model(states), expected)
    assert model(states[:, :0]).shape == (1, 0, 48)


@torch.inference_mode()
def test_a_projection_of_another_input_is_not_mixed_up() -> None:
    model = Attention(bias=True)
    first, second = torch.randn(5, 48), torch.randn(5, 48)
    expected = [model.q_proj(first), model.k_proj(second), model.v_proj(first), model.q_proj(second)]
    pack_linears(model, torch.float32)
    got = [model.q_proj(first), model.k_proj(second), model.v_proj(first), model.q_proj(second)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (320, 1000)])
def test_a_row_is_the_same_bits_in_any_number_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ops = find_packed_ops(dtype)
    if ops is None:
        pytest.skip("this build of torch has no packed linear layers; the engine promises nothing then")
    linear = PackedLinear(torch.randn(shape[1], shape[0], dtype=dtype), None, ops)
    rows = torch.randn(70, shape[0], dtype=dtype)
    expected = linear(rows)
    for count in (1, 2, 3, MIN_ROWS, 5, 16, 17, 64):
        assert torch.equal(linear(rows[:count]), expected[:count])
        assert torch.equal(linear(rows[-count:]), expected[-count:])


@torch.inference_mode()
def test_without_packed_operators_torch_computes() -> None:
    weight, bias, rows = torch.randn(24, 16), torch.randn(24), torch.randn(3, 16)
    torch.testing.assert_close(PackedLinear(weight, bias, None)(rows), rows @ weight.t() + bias)
