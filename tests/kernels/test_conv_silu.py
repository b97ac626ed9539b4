"""The fused convolution: other sizes and strides, and the operator that torch sees."""

import pytest
import torch

from longctx_layers.kernels import conv_silu
from longctx_layers.ops import conv_silu as operation

pytestmark = pytest.mark.usefixtures("interpret")


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (5, 3), (9, 1)])
def test_other_sizes_strides_and_nothing_before(channels, width):
    x = torch.randn(channels, 20, 2, dtype=torch.float64).transpose(0, 2)
    weight = torch.randn(channels, width, dtype=torch.float64)
    actual = operation(x, weight, backend="triton")
    torch.testing.assert_close(actual, operation(x, weight, backend="reference"))


def test_the_operator_is_registered_whole():
    inputs = [torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(2, 3, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(conv_silu.conv_silu, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(conv_silu.conv_silu, inputs[:2], fast_mode=True)
    torch.library.opcheck(conv_silu.conv_silu, (*inputs, torch.zeros(2, 5, dtype=torch.int64)))
