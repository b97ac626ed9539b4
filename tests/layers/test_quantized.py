"""Weights that hold integers or floats of 8 bits: activations and states never take their dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer


class Stored(nn.Module):
    """A product whose weight is stored in another dtype, as bitsandbytes and others do."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 100
        stored = (linear.weight.detach() / self.scale).to(dtype)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_floating_point()
        assert x.dtype.itemsize > 1
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantize(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Stored(child, dtype))
    return layer


def rounded(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same numbers in the layer's own dtype."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().max() / 100
            weight = (module.weight.detach() / scale).to(dtype).to(module.weight.dtype) * scale
            module.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_quantised_weights(case, stored):
    """Outputs, streams and gradients of the input are those of the rounded weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 16, generator=generator).requires_grad_()
    quantized = quantize(small_layer(case, dtype=torch.float32), stored)
    same = rounded(small_layer(case, dtype=torch.float32), stored)
    y, state = quantized(x)
    expected, expected_state = same(x)
    assert_close((y, state), (expected, expected_state))
    assert_close(*(torch.autograd.grad(z.sin().sum(), x)[0] for z in (y, expected)))

    empty = quantized.init_state(2)
    assert [s.dtype for s in empty] == [s.dtype for s in expected_state]
    assert quantized.state_size(24) == same.state_size(24)
    first, state = quantized(x[:, :11], empty)
    second, _ = quantized(x[:, 11:], state)
    assert_close(torch.cat([first, second], 1), expected, rtol=1e-4, atol=1e-5)
