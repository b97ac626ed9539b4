"""Second derivatives of whole layers and models, in the ways that users ask for them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from longctx_layers import use_backend
from longctx_layers.testing import LAYER_CASES, small_layer, small_model

CASES = pytest.mark.parametrize("case", LAYER_CASES)
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


@pytest.fixture
def x():
    return torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def penalty(layer, x, call):
    """Gradients of a penalty on all gradients; x goes through a state, and state gradients count.

    Returns:
        By parameter, and for x.
    """
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    _, state = call(layer, x[:, :9])
    y, state = call(layer, x[:, 9:], state)
    loss = y.sin().sum() + sum(s.square().sum() for s in state if s.is_floating_point())
    slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(sum(g.square().sum() for g in slopes), leaves)


@CASES
def test_gradient_penalties(case, x):
    layer = small_layer(case)
    with use_backend("reference"):
        expected = penalty(layer, x, lambda layer, *inputs: layer(*inputs))
    for backend in ("auto", "torch"):
        with use_backend(backend):
            actual = penalty(layer, x, lambda layer, *inputs: layer(*inputs))
        assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("case", ["dpassm", "blade-memory", "bigbird"])
def test_gradient_penalties_under_checkpointing(case, x):
    layer = small_layer(case)
    with use_backend("reference"):
        expected = penalty(layer, x, lambda layer, *inputs: layer(*inputs))

    def checkpointed(layer, *inputs):
        return checkpoint(layer, *inputs, use_reentrant=False)

    assert_close(penalty(layer, x, checkpointed), expected, **CLOSE)


def test_hessian_vector_products_of_torch(x):
    layer, direction = small_layer("dpassm-global"), x.roll(1, 1)
    products = [torch.autograd.functional.hvp, torch.autograd.functional.vhp]
    for product in products:
        found = []
        for backend in ("auto", "torch", "reference"):
            with use_backend(backend):
                found.append(product(lambda x: layer(x)[0].sin().sum(), x, direction))
        assert_close(found[0], found[2], **CLOSE)
        assert_close(found[1], found[2], **CLOSE)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_loss_of_a_model(gradient_checkpointing):
    model = small_model("dpassm", "blade", tie_embeddings=False)
    ids = torch.randint(0, 13, (2, 40), generator=torch.Generator().manual_seed(0))
    weight = model.blocks[0].ffn.down_proj.weight

    def product():
        (slope,) = torch.autograd.grad(
            model.loss(ids, ids, tokens_at_once=16), weight, create_graph=True
        )
        return torch.autograd.grad(slope.sin().sum(), weight)[0]

    with use_backend("reference"):
        expected = product()
    model.gradient_checkpointing = gradient_checkpointing
    assert_close(product(), expected, **CLOSE)
