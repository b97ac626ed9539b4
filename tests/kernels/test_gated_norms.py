"""The fused gate and norms, interpreted, equal the reference: output and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from longctx_layers.kernels import gated_norms
from op_cases import assert_as_precise, assert_equal_in_float64, cases

from longctx_layers.ops import gated_norms as operation

LENGTHS = [1, 2, 7, 8, 9, 17]


@pytest.fixture(autouse=True)
def _interpret(interpret, monkeypatch):
    monkeypatch.setattr(gated_norms, "ELEMENTS", 32)


@given(case=cases("gated_norms", LENGTHS))
def test_equal_in_float64(case):
    assert_equal_in_float64("gated_norms", case, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases("gated_norms", LENGTHS))
@settings(max_examples=5)
def test_as_precise_as_the_reference(dtype, case):
    assert_as_precise("gated_norms", case, dtype, backend="triton")


@pytest.mark.parametrize("dim", [1, 32, 48])
def test_head_dims_and_strides(dim):
    z, o, s = (torch.randn(2, 3, 5, dim, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    weights = torch.randn(2, 3, dim, dtype=torch.float64)
    actual = operation(z, o, s, *weights, backend="triton")
    expected = operation(z, o, s, *weights, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_operator_is_registered_whole():
    inputs = [torch.randn(2, 3, 2, 3).double().requires_grad_() for _ in range(3)]
    inputs += [torch.randn(2, 3).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(gated_norms.gated_norms, (*inputs, 1e-5))
    torch.library.opcheck(gated_norms.gated_norms, (*inputs, 1e-5))
