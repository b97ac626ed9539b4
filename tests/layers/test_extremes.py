"""No NaN and no loss at the edges: extreme decays and inputs, no token and one token."""

import pytest
import torch
from torch.testing import assert_close

from longctx_layers import use_backend
from longctx_layers.testing import LAYER_CASES, rates, small_layer

CASES = pytest.mark.parametrize("case", LAYER_CASES)
DECAYS = [  # a layer with the name of one of its parameters
    (case, name)
    for case in LAYER_CASES
    for name in dict.fromkeys(full.rsplit(".", 1)[-1] for full in rates(small_layer(case)))
]


def assert_finite(*tensors):
    for tensor in tensors:
        assert torch.isfinite(tensor).all()


def assert_finite_results(layer, x):
    """Outputs, state, and the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y, state = layer(x)
    assert_finite(y, *state, *torch.autograd.grad(y.sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize(("case", "name"), DECAYS)
@pytest.mark.parametrize("values", [[30.0, 30.0], [-30.0, -30.0], [30.0, -30.0], [12.0, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays(case, name, values, dtype):
    layer = small_layer(case, dtype=dtype)
    with torch.no_grad():
        for parameter in (p for n, p in layer.named_parameters() if n.endswith(name)):
            parameter.copy_(torch.tensor(values).repeat(len(parameter))[: len(parameter)])
    x = torch.randn(2, 150, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_finite_results(layer, x)
    y, final = layer(x)
    first, state = layer(x[:, :71])
    second, state = layer(x[:, 71:], state)
    exact = 1e-8 if dtype == torch.float64 else 1e-3
    with use_backend("reference"):
        assert_close((y, final), layer(x), rtol=exact, atol=exact)
    assert_close((torch.cat([first, second], 1), state), (y, final), rtol=exact, atol=exact)


@CASES
def test_no_token(case):
    layer = small_layer(case)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    empty, ids = x[:, :0], torch.zeros(2, 0, dtype=torch.int64)
    _, state = layer(x)
    for given in (None, state):
        before = layer.init_state(2) if given is None else given
        for segment_ids in (None, ids):
            y, after = layer(empty, given, segment_ids=segment_ids)
            assert y.shape == (2, 0, 16)
            assert y.dtype == torch.float64
            assert_close(after, before, rtol=0, atol=0)
    assert layer(x[:0])[0].shape == (0, 7, 16)


@CASES
def test_one_token_sees_itself_alone(case):
    layer = small_layer(case)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    y, state = layer(x[:, :1])
    assert y.shape == (2, 1, 16)
    assert_close(y, layer(x)[0][:, :1])
    assert state.position.tolist() == [1, 1]


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_huge_and_tiny_inputs(case, dtype, scale):
    layer = small_layer(case, dtype=dtype)
    x = scale * torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(0))
    assert_finite_results(layer, x.to(dtype))
    _, state = layer(x[:, :40].to(dtype))
    assert_finite(layer(x[:, 40:].to(dtype), state)[0])


@CASES
def test_no_row(case):
    layer = small_layer(case)
    for length in (1, 12):
        _, state = layer(torch.zeros(0, length, 16, dtype=torch.float64))
        y, state = layer(torch.zeros(0, length, 16, dtype=torch.float64), state)
        assert y.shape == (0, length, 16)
        assert all(len(x) == 0 for x in state)


@CASES
def test_a_new_segment_forgets_nan(case):
    """A slot of a server that once overflowed serves the next request."""
    layer = small_layer(case)
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = torch.tensor([[0] * 10, [5] * 10])
    _, broken = layer(torch.full_like(x[:, :10], float("nan")), segment_ids=old)
    new = torch.tensor([[1] * 30, [-1] * 3 + [6] * 27])
    assert_close(layer(x, broken, segment_ids=new)[0], layer(x, segment_ids=new)[0])
