"""What only a GPU can show; a stand-in runs every line of it, interpreted, on any machine."""

from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.op_cases import assert_as_precise, cases
from support.sizes import LENGTHS
from torch.testing import assert_close

from longctx_layers import explain, self_check, use_backend
from longctx_layers.testing import LAYER_CASES, assert_within_budget, small_layer

REAL = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if REAL else (torch.bfloat16,)
HEAD_DIMS = (32, 48, 64, 128, 256) if REAL else (32,)
ROUNDED = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture(params=["cuda", "stand-in"], autouse=True)
def device(request):
    """A GPU; or the CPU with the interpreter, where there is none."""
    if request.param == "cuda":
        if not REAL:
            pytest.skip("needs a GPU that torch can use")
        return torch.device("cuda")
    if REAL:
        pytest.skip("there is a GPU: no stand-in is needed")
    request.getfixturevalue("interpret")
    return torch.device("cpu")


@pytest.mark.slow  # interpreted it takes long; test_reference.py compares the same operations
def test_selfcheck(device):
    lengths, dtypes = (200, 1000) if REAL else (20,), DTYPES
    for length in lengths:
        backends = ("triton", "flash", "flex", "torch") if REAL else ("triton",)
        found = list(self_check.checks(device, backends=backends, dtypes=dtypes, length=length))
        assert {check.case for check in found if check.output is not None}
        assert not [str(check) for check in found if check.failed]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(
    max_examples=50 if REAL else 1, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_as_precise_as_the_reference(device, name, dtype, data):
    lengths = [1, 2, 63, 64, 65, 127, 129, 300] if REAL else [17]
    case = data.draw(cases(name, lengths))
    assert_as_precise(name, case, dtype, backend="triton", device=device)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(device, head_dim, dtype):
    layer = small_layer("window", d_model=4 * head_dim, dtype=dtype).to(device)
    x = torch.randn(2, 300 if REAL else 20, 4 * head_dim, dtype=dtype, device=device)
    y, _ = layer(x)
    with use_backend("reference"):
        wide, _ = layer.double()(x.double())
    assert_within_budget(y, wide.to(dtype), wide, factor=16)  # projections round too


@pytest.mark.parametrize("case", LAYER_CASES if REAL else ("dpassm-global", "blade-memory"))
def test_layers_stream_on_the_kernels(device, case):
    layer = small_layer(case, dtype=torch.float32).to(device)
    x = torch.randn(2, 40 if REAL else 12, 16, device=device)
    runs = {row.backend for row in explain(layer, x) if row.chosen}
    assert "triton" in runs
    with use_backend("reference"):
        expected, final = deepcopy(layer).double().cpu()(x.double().cpu())
    state, pieces = None, []
    for piece in x.split([7, 1, 1, len(x[0]) - 9], dim=1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1).cpu().double(), expected, **ROUNDED)
    for name, part in final._asdict().items():
        assert_close(getattr(state, name).cpu().double(), part.double(), **ROUNDED)


# Of the others, test_tracing.py compiles the operations.
@pytest.mark.parametrize(
    "case", ["window", *(pytest.param(c, marks=pytest.mark.slow) for c in ("dpassm", "blade"))]
)
def test_compiled_without_a_break(device, case):
    layer = small_layer(case, dtype=torch.float32).to(device)
    x = torch.randn(2, 40 if REAL else 9, 16, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if REAL else "aot_eager")
    outputs = [run(x)[0] for run in (layer, compiled)]
    assert_close(*outputs, **ROUNDED)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    assert_close(*gradients, **ROUNDED)
