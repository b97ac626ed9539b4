"""The diagonal kernels, interpreted, equal the reference: outputs, states and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from longctx_layers.kernels import diagonal
from op_cases import assert_as_precise, assert_equal_in_float64, cases

from longctx_layers.ops import diagonal_scan

LENGTHS = [1, 2, 15, 16, 17, 33, 40]  # around the edges of the small tiles below


@pytest.fixture(autouse=True)
def _interpret(interpret, monkeypatch):
    monkeypatch.setattr(diagonal, "TILE", 16)
    monkeypatch.setattr(diagonal, "CHANNELS", 4)


@given(case=cases("diagonal_scan", LENGTHS))
def test_equal_in_float64(case):
    assert_equal_in_float64("diagonal_scan", case, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=cases("diagonal_scan", LENGTHS))
@settings(max_examples=5)
def test_as_precise_as_the_reference(dtype, case):
    assert_as_precise("diagonal_scan", case, dtype, backend="triton")


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_many_channels_and_strides(channels):
    u = torch.randn(channels, 20, 2, dtype=torch.float64).transpose(0, 2)
    log_decay = -torch.rand(channels, dtype=torch.float64)
    actual = diagonal_scan(u, log_decay, backend="triton")
    expected = diagonal_scan(u, log_decay, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_operator_is_registered_whole(monkeypatch):
    monkeypatch.setattr(diagonal, "TILE", 4)
    inputs = [torch.randn(2, 6, 3), torch.rand(2, 6, 3), torch.randn(2, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(diagonal.diagonal_scan, inputs)
    segments = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([6, 3])
    torch.library.opcheck(diagonal.diagonal_scan, (*inputs, *segments))
