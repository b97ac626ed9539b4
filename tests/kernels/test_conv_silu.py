"""The fused convolution, interpreted, equals the reference: output and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from longctx_layers.kernels import conv_silu
from op_cases import assert_as_precise, assert_equal_in_float64, cases

from longctx_layers.ops import conv_silu as operation

LENGTHS = [1, 2, 3, 5, 7, 8, 9, 17]


@pytest.fixture(autouse=True)
def _interpret(interpret, monkeypatch):
    monkeypatch.setattr(conv_silu, "TOKENS", 8)
    monkeypatch.setattr(conv_silu, "CHANNELS", 4)


@given(case=cases("conv_silu", LENGTHS))
def test_equal_in_float64(case):
    assert_equal_in_float64("conv_silu", case, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases("conv_silu", LENGTHS))
@settings(max_examples=5)
def test_as_precise_as_the_reference(dtype, case):
    assert_as_precise("conv_silu", case, dtype, backend="triton")


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (5, 3), (9, 1)])
def test_other_sizes_strides_and_nothing_before(channels, width):
    x = torch.randn(channels, 20, 2, dtype=torch.float64).transpose(0, 2)
    weight = torch.randn(channels, width, dtype=torch.float64)
    actual = operation(x, weight, backend="triton")
    torch.testing.assert_close(actual, operation(x, weight, backend="reference"))


def test_the_operator_is_registered_whole():
    inputs = [torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(2, 3, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(conv_silu.conv_silu, inputs)
    assert torch.autograd.gradcheck(conv_silu.conv_silu, inputs[:2])
    torch.library.opcheck(conv_silu.conv_silu, (*inputs, torch.zeros(2, 5, dtype=torch.int64)))
