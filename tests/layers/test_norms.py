"""The norms of two paths are modules like others, although one operation computes both at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from longctx_layers.layers import norms
from longctx_layers.layers.norms import HeadNorm
from longctx_layers.ops.gated_norms import EPS
from longctx_layers.testing import small_layer

NORMS = [("dpassm", "norm_o"), ("dpassm", "norm_s"), ("blade", "norm_o"), ("blade", "norm_r")]
each_norm = pytest.mark.parametrize(("case", "name"), NORMS)


@pytest.fixture
def x():
    return torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def fused(monkeypatch):
    """Calls of the fused operation."""
    calls, operation = [], norms.gated_norms
    monkeypatch.setattr(norms, "gated_norms", lambda *args: calls.append(1) or operation(*args))
    return calls


@pytest.mark.parametrize("case", ["dpassm", "blade"])
def test_plain_norms_are_fused(case, x, fused):
    small_layer(case)(x)
    assert fused == [1]


def expected_of(case, name, x):
    """What a layer gives whose norm is doubled."""
    layer = small_layer(case)
    with torch.no_grad():
        getattr(layer, name).weight.mul_(2)
    return layer(x)[0]


@each_norm
def test_hooks_run_and_change_the_output(case, name, x, fused):
    layer, expected = small_layer(case), expected_of(case, name, x)
    norm = getattr(layer, name)
    fused.clear()

    def double(module, inputs, y):
        return 2 * y if module is norm else None

    for register in (norm.register_forward_hook, register_module_forward_hook):
        handle = register(double)
        try:
            assert_close(layer(x)[0], expected)
        finally:
            handle.remove()
    handle = norm.register_full_backward_pre_hook(lambda module, dy: (0 * dy[0],))
    layer(x)[0].sum().backward()
    assert norm.weight.grad.eq(0).all()
    assert not fused
    handle.remove()
    layer(x)
    assert fused


class Doubled(nn.Module):
    """A wrapper that shows its module's weight, as adapters do."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, x):
        return 2 * self.norm(x)


class DoubledNorm(HeadNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _wrapped(layer, name):
    setattr(layer, name, Doubled(getattr(layer, name)))


def _subclass(layer, name):
    getattr(layer, name).__class__ = DoubledNorm


def _patched_forward(layer, name):
    norm = getattr(layer, name)
    norm.forward = lambda x: 2 * HeadNorm.forward(norm, x)


def _parametrized(layer, name):
    parametrize.register_parametrization(getattr(layer, name), "weight", Double())


@each_norm
@pytest.mark.parametrize("change", [_wrapped, _subclass, _patched_forward, _parametrized])
def test_other_modules_are_called(case, name, change, x):
    layer = small_layer(case)
    change(layer, name)
    assert_close(layer(x)[0], expected_of(case, name, x))


@each_norm
def test_pruned_and_foreign_norms(case, name, x):
    layer = small_layer(case)
    prune.random_unstructured(getattr(layer, name), "weight", amount=5)
    with torch.no_grad():  # the mask is applied in each call
        getattr(layer, name).weight_orig.mul_(2)
    pruned = small_layer(case)
    with torch.no_grad():
        getattr(pruned, name).weight.mul_(2 * getattr(layer, name).weight_mask)
    assert_close(layer(x)[0], pruned(x)[0])

    # One scale for all heads, with an eps of its own.
    other = nn.RMSNorm(4, EPS, dtype=x.dtype)
    setattr(layer, name, other)
    with torch.no_grad():
        other.weight.copy_(torch.arange(1, 5))
        getattr(pruned, name).weight.copy_(other.weight.expand(4, 4))
    assert_close(layer(x)[0], pruned(x)[0])
