"""The fused gate and norms: other sizes and strides, and the operator that torch sees."""

import pytest
import torch

from longctx_layers.kernels import gated_norms
from longctx_layers.ops import gated_norms as operation

pytestmark = pytest.mark.usefixtures("interpret")


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
