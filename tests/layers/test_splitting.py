"""Calls in pieces on a CPU: nothing that can tell a piece from a whole call ever gets one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, spectral_norm
from torch.testing import assert_close

from longctx_layers.layers import splitting
from longctx_layers.testing import small_layer, small_model

DIVIDED = ["window", "dpassm", "dpassm-diagonal", "blade", "blade-shift", "longformer"]
CASES = pytest.mark.parametrize("case", DIVIDED)


@pytest.fixture
def x():
    return torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def small_pieces(monkeypatch):
    """Calls are divided both by rows and by tokens."""
    monkeypatch.setattr(splitting, "TOKENS_AT_ONCE", 16)


def outputs(layer, x, **options):
    """What the layer returns for x, and all gradients."""
    x = x.clone().requires_grad_()
    y, state = layer(x, **options)
    (y.sin().sum() + sum(s.sum() for s in state if s.is_floating_point())).backward()
    return y.detach(), [x.grad, *(p.grad for p in layer.parameters())]


def whole(monkeypatch, layer, x, **options):
    """The same in one piece."""
    with monkeypatch.context() as patch:
        patch.setattr(splitting, "TOKENS_AT_ONCE", 10**6)
        return outputs(layer, x, **options)


def calls_of(layer):
    """How often the layer's own computation has run."""
    made = []
    mix = layer.mix
    layer.mix = lambda x, *rest: made.append(tuple(x.shape)) or mix(x, *rest)
    return made


@CASES
def test_plain_layers_work_in_pieces(case, x, small_pieces, monkeypatch):
    layer = small_layer(case)
    expected = whole(monkeypatch, deepcopy(layer), x)
    made = calls_of(layer)
    assert_close(outputs(layer, x), expected)
    assert {batch for batch, *_ in made} == {1}
    assert len(made) > len(x)


@CASES
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_whole_calls(case, kind, x, small_pieces, monkeypatch):
    """Of every module in the layer, whatever its depth."""
    for name, module in small_layer(case).named_modules():
        if name and not hasattr(module, "weight"):
            continue  # a container, which takes more than tensors
        layer, seen = small_layer(case), []

        def note(module, inputs, *_, seen=seen):
            seen.append(inputs[0].shape)

        getattr(layer.get_submodule(name), f"register_{kind}_hook")(note)
        outputs(layer, x)
        found = seen.copy()
        seen.clear()
        whole(monkeypatch, layer, x)
        assert found == seen, name
        assert len(found) == 1, name


@CASES
def test_global_hooks_see_whole_calls(case, x, small_pieces):
    layer, seen = small_layer(case), []
    handle = register_module_forward_hook(lambda module, inputs, y: seen.append(module))
    try:
        outputs(layer, x)
    finally:
        handle.remove()
    assert len(seen) == len(set(seen)) > 1


class ByRow(nn.Linear):
    """An adapter that is chosen by row, as PEFT's with `adapter_names`."""

    def forward(self, x):
        return super().forward(x) * torch.arange(1, len(x) + 1).view(-1, 1, 1)


class ByBatch(nn.Linear):
    """Inputs rounded in units of the largest one in the batch, as quantised activations are."""

    def forward(self, x):
        unit = x.detach().abs().max() / 7
        return super().forward(x + ((x / unit).round() * unit - x).detach())


class Tagged(torch.Tensor):
    """A weight of another class, which may do anything in a product."""


def _replaced(kind):
    def change(layer):
        layer.v_proj.__class__ = kind

    return change


def _patched_forward(layer):
    """As accelerate's hooks do."""
    layer.v_proj.forward = lambda x: nn.functional.linear(x, layer.v_proj.weight) + x.mean()


def _tagged_weight(layer):
    weight = layer.v_proj.weight.detach().as_subclass(Tagged)
    layer.v_proj.weight = nn.Parameter(weight)


def _hooked_output(layer):
    layer.v_proj.register_forward_hook(lambda module, inputs, y: y - y.mean((0, 1)))


def _dropout(layer):
    layer.dropout = 0.3


CHANGES = {
    "by row": _replaced(ByRow),
    "by batch": _replaced(ByBatch),
    "patched forward": _patched_forward,
    "tagged weight": _tagged_weight,
    "hooked output": _hooked_output,
    "dropout": _dropout,
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.v_proj),
    "spectral norm by hooks": lambda layer: spectral_norm(layer.v_proj),
    "parametrized layer": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.v_proj, "weight", nn.Softplus()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["dpassm", "blade"])
def test_results_are_those_of_one_call(case, change, x, small_pieces, monkeypatch):
    """Also what modules learn from a call, such as the vectors of a spectral norm."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(small_layer(case))
        CHANGES[change](layers[-1])
        layers[-1].train()
    made = calls_of(layers[0])
    torch.manual_seed(1)
    found = outputs(layers[0], x)
    torch.manual_seed(1)
    assert_close(found, whole(monkeypatch, layers[1], x), rtol=1e-12, atol=1e-12)
    assert made == [tuple(x.shape)]
    assert_close(dict(layers[0].named_buffers()), dict(layers[1].named_buffers()))


def test_dropout_out_of_training_does_not_hinder(x, small_pieces):
    layer = small_layer("dpassm")
    layer.dropout = 0.3
    made = calls_of(layer.eval())
    layer(x)
    assert len(made) > len(x)


def test_the_loss_calls_a_hooked_head_once_with_whole_rows():
    model = small_model("window", tie_embeddings=False)
    ids = torch.randint(0, 13, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    for reduction in ("mean", "none"):
        expected = model.loss(ids, labels, tokens_at_once=16, reduction=reduction)
        (slope,) = torch.autograd.grad(expected.sum(), model.head.weight)
        seen = []
        handle = model.head.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.shape))
        found = model.loss(ids, labels, tokens_at_once=16, reduction=reduction)
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found.sum(), model.head.weight)[0], slope)
        assert seen == [(2, 40, 13)]
        handle.remove()


def test_the_loss_of_a_head_that_is_chosen_by_row():
    model = small_model("window", tie_embeddings=False)
    model.head.__class__ = ByRow
    ids = torch.randint(0, 13, (2, 40), generator=torch.Generator().manual_seed(0))
    found = model.loss(ids, ids, reduction="none", tokens_at_once=16)
    expected = nn.functional.cross_entropy(model(ids).mT, ids, reduction="none")
    assert_close(found, expected)
