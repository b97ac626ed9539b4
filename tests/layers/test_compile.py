"""torch.compile without graph breaks: the same results, for any length, state included."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, small_layer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# How many chunks a continued or packed row has is data: BLADE's mlp cannot be one graph there.
ONE_GRAPH = [case for case in LAYER_CASES if "mlp" not in case]


def matrix(cases, **fast):
    """All of them with generated code are slow; a few without it belong to the fast tests."""
    slow = [pytest.param(case, "inductor", marks=pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(("case", "backend"), [*fast.items(), *slow])


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.manual_seed(0)
    torch._dynamo.reset()


@matrix(LAYER_CASES, dpassm="aot_eager", blade="aot_eager", longformer="aot_eager")
def test_compiled_training(case, backend):
    layer = small_layer(case, dtype=torch.float32)
    x = torch.randn(2, 21, 16, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, state = torch.compile(layer, fullgraph=True, backend=backend)(x)
    expected, expected_state = layer(x)
    assert_close((y, state), (expected, expected_state), **CLOSE)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), **CLOSE)


@matrix(ONE_GRAPH, dpassm="eager")
@torch.no_grad()
def test_compiled_streaming(case, backend):
    layer = small_layer(case, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x, state, expected_state = torch.randn(2, 20, 16), None, None
    ids = torch.tensor([[0] * 9 + [1] * 10 + [-1], [-1] * 3 + [2] * 17])
    for part, part_ids in zip(x.split([12, 7, 1], 1), ids.split([12, 7, 1], 1), strict=True):
        y, state = compiled(part, state, segment_ids=part_ids)
        expected, expected_state = layer(part, expected_state, segment_ids=part_ids)
        assert_close((y, state), (expected, expected_state), **CLOSE)


@pytest.mark.parametrize("mark", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "blade" else pytest.mark.slow) for case in ONE_GRAPH],
)
def test_one_graph_serves_many_lengths(case, mark):
    layer, counter = small_layer(case, dtype=torch.float32), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=None if mark else True)
    for length in (141, 142, 155, 200, 97, 333):
        x = torch.randn(2, length, 16)
        if mark:
            torch._dynamo.mark_dynamic(x, 1)
        assert_close(compiled(x), layer(x), **CLOSE)
    # Lengths that fill their last block may need a graph of their own.
    assert counter.frame_count <= 2


def test_compiling_may_be_the_first_call_of_a_process():
    code = (
        "import torch; from longctx_layers import DPASSM\n"
        "layer = DPASSM(16, 2, window_size=4, ssm_state_dim=4)\n"
        "x = torch.randn(1, 9, 16)\n"
        "y, state = torch.compile(layer, fullgraph=True, backend='aot_eager')(x)\n"
        "assert torch.isfinite(y).all()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
