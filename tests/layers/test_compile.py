"""torch.compile without graph breaks, and torch.export: the same results, state included."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer

REPRESENTATIVE = ("dpassm", "blade", "longformer")
# The rest of the matrix takes minutes.
CASES = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in REPRESENTATIVE else pytest.mark.slow) for c in LAYER_CASES],
)
TRACEABLE = [c for c in LAYER_CASES if "mlp" not in c]  # its chunks are a loop in Python
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit


def sequence(length):
    return torch.randn(2, length, 16)


@CASES
def test_compiled_training(case):
    layer = small_layer(case, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    x = sequence(21).requires_grad_()
    inputs = [x, *layer.parameters()]
    y, state = compiled(x)
    expected, expected_state = layer(x)
    assert_close((y, state), (expected, expected_state), **CLOSE)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), **CLOSE)
