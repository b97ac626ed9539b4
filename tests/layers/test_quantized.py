"""Weights that hold integers or floats of 8 bits: activations and states never take their dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
]


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


class StoredElsewhere(Stored):
    """The same without a `weight`, as GPTQ, AWQ and HQQ have it."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self.qweight = self.weight
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.qweight.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantize(layer: nn.Module, dtype: torch.dtype, kind: type[Stored] = Stored) -> nn.Module:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child, dtype))
    return layer


def rounded(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same numbers in the layer's own dtype."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().max() / 100
            weight = (module.weight.detach() / scale).to(dtype).to(module.weight.dtype) * scale
            module.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize(
    ("kind", "stored"),
    [(Stored, torch.int8), (Stored, torch.float8_e4m3fn), (StoredElsewhere, torch.int8)],
)
@pytest.mark.parametrize("case", LAYER_CASES)
def test_quantised_weights(case, kind, stored):
    """Outputs, streams and gradients of the input are those of the rounded weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 16, generator=generator).requires_grad_()
    quantized = quantize(small_layer(case, dtype=torch.float32), stored, kind)
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


@pytest.mark.parametrize("kind", [Stored, StoredElsewhere])
@pytest.mark.parametrize("case", ["dpassm", "dpassm-diagonal", "blade-memory", "longformer-biased"])
def test_states_have_the_dtype_of_what_is_not_quantised(case, kind):
    """Not that of the time scales, which are float32 in a layer of any dtype."""
    plain = small_layer(case, dtype=torch.bfloat16)
    expected = [s.dtype for s in plain.init_state(2)]
    quantized = quantize(plain, torch.int8, kind)
    assert [s.dtype for s in quantized.init_state(2)] == expected
    x = torch.randn(2, 9, 16, dtype=torch.bfloat16)
    assert [s.dtype for s in quantized(x)[1]] == expected


def dynamically(module: nn.Module) -> nn.Module:
    """Linear layers as torch packs them: no parameters, and `weight` is a method."""
    return torch.ao.quantization.quantize_dynamic(module.eval(), {nn.Linear}, dtype=torch.qint8)


class Packed(nn.Module):
    """A product of torch's, beside the weight that it was made from."""

    def __init__(self, packed: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.packed, self.weight = packed, linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_dynamic_quantisation(case):
    """Nothing but the products is different, whatever the packed modules show of themselves."""
    layer = small_layer(case, dtype=torch.float32).eval()
    quantized, same = dynamically(layer), dynamically(layer)
    for name, module in list(layer.named_modules()):
        # Gates are linear too, but of another class, and stay as they are.
        if type(module) is nn.Linear:
            same.set_submodule(name, Packed(same.get_submodule(name), module))
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    assert_close(quantized(x), same(x), rtol=0, atol=0)
    assert_close(quantized.init_state(2), same.init_state(2), rtol=0, atol=0)
    assert quantized.state_size(24) == layer.state_size(24)
    assert quantized(x[:, :0])[0].shape == (2, 0, 16)

    first, state = quantized(x[:, :11])
    second, _ = quantized(x[:, 11:], state)
    expected = layer(x)[0]
    # Inputs are rounded in units that the whole call decides.
    for found in (quantized(x)[0], torch.cat([first, second], 1)):
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_dynamic_quantisation_of_models():
    ids = torch.randint(0, 13, (2, 24), generator=torch.Generator().manual_seed(0))
    model = small_model("dpassm", "blade", "vanilla", dtype=torch.float32).eval()
    quantized = dynamically(model)
    expected = model(ids)
    assert 0 < (quantized(ids) - expected).norm() < 0.2 * expected.norm()
    assert quantized.generate(ids, max_new_tokens=2).shape == (2, 26)


def test_quantised_embeddings():
    ids = torch.randint(0, 13, (2, 24), generator=torch.Generator().manual_seed(0))
    kinds = {nn.Embedding: torch.ao.quantization.float_qparams_weight_only_qconfig}
    untied, tied = (
        small_model("dpassm", dtype=torch.float32, tie_embeddings=tie).eval()
        for tie in (False, True)
    )
    quantized = torch.ao.quantization.quantize_dynamic(untied, kinds)
    assert (quantized(ids) - untied(ids)).norm() < 0.1 * untied(ids).norm()
    assert quantized.generate(ids, max_new_tokens=2).shape == (2, 26)
    with pytest.raises(TypeError, match="embedding: expected a floating-point weight"):
        torch.ao.quantization.quantize_dynamic(tied, kinds)(ids)
