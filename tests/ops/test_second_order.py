"""Gradients of gradients, and gradients under hooks on what the backward pass keeps.

Every hand-written backward must have a second derivative, and read what it saved at most once.
Triton's kernels are interpreted in `tests/kernels/test_second_order.py`.
"""

from __future__ import annotations

import pytest
import torch
from support.derivative_cases import SECOND_ORDER, assert_hooks_are_harmless, assert_second_order
from support.flash_stand_in import installed
from support.op_cases import inputs
from torch.testing import assert_close

from longctx_layers.ops import backends as dispatch
from longctx_layers.ops import sparse_attention
from longctx_layers.ops.second_order import twice_differentiable

CASES = pytest.mark.parametrize("case", SECOND_ORDER)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch"])
ATTENTION = [case for case in SECOND_ORDER if case.startswith("sparse_attention")]
VERSIONS = pytest.mark.parametrize("version", [2, 4])


@CASES
@BACKENDS
def test_second_order(case, backend):
    assert_second_order(case, backend)


@pytest.mark.parametrize("case", ATTENTION)
@VERSIONS
def test_second_order_on_flash_attn(case, version):
    with installed(version):
        assert_second_order(case, "flash")


@CASES
@BACKENDS
def test_hooks_on_saved_tensors(case, backend):
    assert_hooks_are_harmless(case, backend)


@pytest.mark.parametrize("case", ATTENTION)
@VERSIONS
def test_hooks_on_saved_tensors_of_flash_attn(case, version):
    with installed(version):
        assert_hooks_are_harmless(case, "flash")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_numerically(backend):
    """Against differences of gradients, which no formula of ours has a part in."""
    tensors = inputs("sparse_attention", 1, 20, groups=1)
    leaves = [x[:, :, :, :2].clone().requires_grad_() for x in tensors.values()]

    def call(q, k, v):
        return sparse_attention(q, k, v, window_size=10, backend=backend)

    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_inputs_that_depend_on_each_other(backend):
    """Each input's gradient is its own share, also where k is made from q, or is q itself."""

    def derivatives(backend):
        q = inputs("sparse_attention", 1, 30, groups=4)["q"].requires_grad_()
        k = q.sin()
        y = sparse_attention(q, k, q, window_size=9, backend=backend)
        (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        return dq, torch.autograd.grad(dq.square().sum(), q)[0]

    assert_close(derivatives(backend), derivatives("reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_third_order(backend):
    def derivatives(backend):
        q, k, v = (x.requires_grad_() for x in inputs("sparse_attention", 1, 30).values())
        values = sparse_attention(q, k, v, window_size=9, backend=backend).square().sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(values, q, create_graph=True)
            values = derivative.pow(2).sum()
        return derivative

    assert_close(derivatives(backend), derivatives("reference"), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_transforms_of_torch_func(backend):
    q, k, v = inputs("sparse_attention", 1, 30).values()
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)

    def loss(q, backend):
        return sparse_attention(q, k, v, window_size=9, backend=backend).square().sum()

    def slope(q, backend):
        return torch.func.grad(loss)(q, backend).mul(direction).sum()

    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, "reference"), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * direction).sum(), leaf)
    assert_close(torch.func.grad(slope)(q, backend), expected)
    (outer,) = torch.autograd.grad(slope(leaf, backend), leaf)  # autograd around a transform
    assert_close(outer, expected)
    forward = torch.func.jvp(torch.func.grad(lambda q: loss(q, backend)), (q,), (direction,))
    assert_close(forward[1], expected)


def test_dropped_weights_have_second_derivatives_or_say_that_they_have_none():
    tensors = [x.requires_grad_() for x in inputs("sparse_attention", 1, 30).values()]
    with installed(2):
        y = sparse_attention(*tensors, window_size=9, dropout_p=0.5, backend="flash")
        torch.autograd.grad(y.sum(), tensors, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"expected dropout 0 .*use_backend\('reference'\)"):
            torch.autograd.grad(y.sum(), tensors, create_graph=True)
    torch.manual_seed(0)
    y = sparse_attention(*tensors, window_size=40, dropout_p=0.5, backend="torch")
    slopes = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    curved = torch.autograd.grad(sum(x.square().sum() for x in slopes), tensors)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in curved)


def test_operations_wrap_their_backends():
    """Whatever a backend's backward is, the operation has the torch backend's second derivative."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):
            return 3 * ctx.saved_tensors[0] ** 2 * dy

    operation = dispatch.Operation("cube")
    operation.register("cpu")(Cube.apply)
    operation.register("torch")(lambda x: x * x * x)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(operation(x).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(slope.sum(), x)[0], 6 * x)


def test_outputs_keep_their_nature():
    """Only what depends on an input that requires a gradient requires one; trees stay trees."""
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)

    def call(a, pair, *, scale):
        return a * scale, (pair[1] + 1, pair[0] * a)

    y, (constant, product) = twice_differentiable(call, call, a, (b, b), scale=2)
    assert y.requires_grad
    assert product.requires_grad
    assert not constant.requires_grad
    y.add_(1)  # results may be changed in place, as those of any function
    (y.sum() + product.sum()).backward()
    assert_close(a.grad, 2 + b)
    with torch.no_grad():
        assert not twice_differentiable(call, call, a, (b, b), scale=2)[0].requires_grad
