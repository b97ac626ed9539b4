"""In float32 and bfloat16 the fast path, whole or streamed, is as precise as the reference."""

from copy import deepcopy

import pytest
import torch

from longctx_layers import use_backend
from longctx_layers.testing import LAYER_CASES, assert_within_budget, small_layer


def results(layer, x, pieces):
    """Outputs and the state's float tensors; the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    ys, state = [], None
    for part in x.split(pieces, 1):
        y, state = layer(part, state)
        ys.append(y)
    outputs = [torch.cat(ys, 1), *(s for s in state if s.is_floating_point() and s.numel())]
    loss = sum((o * o).sum() for o in outputs)
    return outputs, torch.autograd.grad(loss, [x, *layer.parameters()])


def magnitude(x):
    return x.abs().max().item()


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[145], [1, 70, 0, 7, 1, 61, 5]])
def test_fast_path_is_as_precise_as_the_reference(case, dtype, pieces):
    layer = small_layer(case, dtype=dtype, n_kv_heads=2)
    x = torch.randn(2, 145, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Around BLADE's loop over chunks the rounding of one is the next one's input.
    factor = 4.0 if "mlp" in case else 2.0

    def in_dtype(actual):
        # A float32 accumulator, or the gradient of a float32 parameter, is as good as the terms
        # that it sums, which have the input's dtype.
        return torch.finfo(dtype).eps / torch.finfo(actual.dtype).eps

    outputs, gradients = results(layer, x, pieces)
    with use_backend("reference"):
        own_outputs, own_gradients = results(layer, x, [145])
        exact_outputs, exact_gradients = results(deepcopy(layer).double(), x.double(), [145])
    for actual, own, exact in zip(outputs, own_outputs, exact_outputs, strict=True):
        terms = magnitude(exact) * in_dtype(actual)
        assert_within_budget(actual, own, exact, scale=terms, factor=factor)
    # Gradients meet on their way, and small ones are differences of large ones.
    scale = max(magnitude(g) for g in exact_gradients)
    for actual, own, exact in zip(gradients, own_gradients, exact_gradients, strict=True):
        terms = scale * in_dtype(actual)
        assert_within_budget(actual, own, exact, scale=terms, factor=factor)
