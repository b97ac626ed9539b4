"""Forward-mode derivatives of layers and models: `torch.func.jvp` and dual numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.flash_stand_in import installed
from torch.autograd import forward_ad
from torch.testing import assert_close

from longctx_layers import use_backend
from longctx_layers.ops import explain, sparse_attention
from longctx_layers.testing import LAYER_CASES, small_layer, small_model

CASES = pytest.mark.parametrize("case", LAYER_CASES)


def inputs(dtype, length=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, length, 16, generator=generator, dtype=dtype)


def by_duals(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@CASES
def test_products_equal_finite_differences(case):
    """With and without gradients: `torch.no_grad` does not turn forward mode off."""
    layer, (x, direction) = small_layer(case), inputs(torch.float64)
    segment_ids = (torch.arange(24) // 9).expand(2, -1)

    def outputs(x):
        _, state = layer(x[:, :13], segment_ids=segment_ids[:, :13])
        return layer(x[:, 13:], state, segment_ids=segment_ids[:, 13:])[0]

    with torch.no_grad():
        step = 1e-6 * direction
        expected = (outputs(x + step) - outputs(x - step)) / 2e-6
    for mode in (nullcontext, torch.no_grad):
        with mode():
            found = torch.func.jvp(outputs, (x,), (direction,))[1]
            assert_close(found, expected, rtol=1e-6, atol=1e-7)
            assert_close(by_duals(outputs, x, direction), found)


@pytest.mark.parametrize("case", ["vanilla", "dpassm", "dpassm-diagonal", "blade", "blade-1"])
@pytest.mark.parametrize("length", [1, 24])
def test_single_precision_agrees_with_gradients(case, length):
    """`w . (J v) = (w J) . v`; sums of decays are kept in float64 here, by code of their own."""
    layer, (x, direction) = small_layer(case, dtype=torch.float32), inputs(torch.float32, length)
    y, gradient = torch.func.vjp(lambda x: layer(x)[0], x)
    weights = y.sin()
    expected = torch.vdot(gradient(weights)[0].flatten(), direction.flatten())
    with use_backend("torch"):
        found = torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))[1]
    assert_close(torch.vdot(weights.flatten(), found.flatten()), expected, rtol=1e-4, atol=1e-5)
    assert_close(by_duals(lambda x: layer(x)[0], x, direction), found)


def test_the_loss_of_a_model_by_its_weights():
    model = small_model("dpassm", "blade", dtype=torch.float32)
    ids = torch.randint(0, 13, (2, 40), generator=torch.Generator().manual_seed(0))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: p.sin() for name, p in weights.items()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,)).sin().mean()

    slopes = torch.func.grad(loss)(weights)
    expected = sum((slopes[name] * directions[name]).sum() for name in weights)
    assert_close(torch.func.jvp(loss, (weights,), (directions,))[1], expected)


def test_kernels_without_such_derivatives_refuse():
    q, k, v = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, k)
        rows = explain(sparse_attention, dual, k, v, window_size=9)
        reasons = {row.backend: row.reason for row in rows}
        for backend in ("triton", "flash", "flex", "cpu"):
            assert reasons[backend] == "has no forward-mode derivatives"
        assert reasons["torch"] == "runs this call"
        with installed(2):
            with pytest.raises(ValueError, match="no forward-mode derivatives; use backend='auto'"):
                sparse_attention(dual, k, v, window_size=9, backend="flash")
            y = sparse_attention(dual, k, v, window_size=9)
        assert forward_ad.unpack_dual(y).tangent is not None
