"""`use_liger` gives the same model; Liger's own functions need a GPU, so stand-ins compute here."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from longctx_layers.lm import liger
from longctx_layers.testing import small_model

FUNCTIONS = "liger_kernel.transformers.functional"


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
    return F.rms_norm(X, W.shape, W, eps)


def liger_swiglu(a, b):
    return F.silu(a) * b


def liger_cross_entropy(input, target, *, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)


STAND_INS = (liger_rms_norm, liger_swiglu, liger_cross_entropy)


@pytest.fixture
def stand_in(monkeypatch):
    """Counts the calls of each function."""
    calls = dict.fromkeys((function.__name__ for function in STAND_INS), 0)
    module = ModuleType(FUNCTIONS)
    for function in STAND_INS:

        def counted(*args, function=function, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        setattr(module, function.__name__, counted)
    monkeypatch.setattr(liger, "INSTALLED", True)
    monkeypatch.setitem(sys.modules, FUNCTIONS, module)
    return calls


def test_the_same_model(stand_in):
    model = small_model("dpassm", "blade")
    ids = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    expected = model.loss(ids, ids)
    gradients = torch.autograd.grad(expected, parameters.values())
    assert liger.use_liger(model) is model
    loss = model.loss(ids, ids)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, parameters.values()), gradients)
    assert list(dict(model.named_parameters())) == list(parameters)
    assert stand_in["liger_rms_norm"] == 5  # two in each of two blocks, and the last one
    assert stand_in["liger_swiglu"] == 2
    assert stand_in["liger_cross_entropy"] > 0


def test_second_derivatives_are_refused(stand_in):
    """Not silently zero, in the call that would have made the graph."""
    model = liger.use_liger(small_model("window", tie_embeddings=False))
    ids = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    weight = model.blocks[0].ffn.down_proj.weight
    for value in (model.loss(ids, ids), model(ids).sum()):
        with pytest.raises(RuntimeError, match="differentiate a model without use_liger"):
            torch.autograd.grad(value, weight, create_graph=True)


def test_without_it_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(liger, "INSTALLED", False)
    with pytest.raises(ImportError, match=r"longctx-layers\[liger\]"):
        liger.use_liger(small_model("window"))


@pytest.mark.parametrize("function", STAND_INS)
def test_the_stand_ins_have_its_arguments(function):
    pytest.importorskip("liger_kernel", reason="needs the extra `liger`")
    functions = pytest.importorskip(FUNCTIONS)
    theirs = inspect.signature(getattr(functions, function.__name__)).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        assert name in theirs
        assert theirs[name].default == parameter.default
