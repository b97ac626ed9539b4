"""The diagonal kernels: other sizes and strides, and the operator that torch sees."""

import pytest
import torch

from longctx_layers.kernels import diagonal
from longctx_layers.ops import diagonal_scan

pytestmark = pytest.mark.usefixtures("interpret")


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
    assert torch.autograd.gradcheck(diagonal.diagonal_scan, inputs, fast_mode=True)
    segments = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([6, 3])
    torch.library.opcheck(diagonal.diagonal_scan, (*inputs, *segments))
