"""The fast path computes what the definitions say: forward and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longctx_layers import use_backend
from longctx_layers.testing import LAYER_CASES, small_layer

FEWER = settings(max_examples=max(settings.default.max_examples // 4, 1))
CASES = pytest.mark.parametrize("case", LAYER_CASES)
# One less, as many and one more than blocks of 16, 64 and 128 hold.
LENGTHS = st.sampled_from([2, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 193])


def results(layer, x, ids=None):
    """Outputs, the state's float tensors, and the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y, state = layer(x, segment_ids=ids)
    outputs = [y, *(s for s in state if s.is_floating_point())]
    loss = sum((o * o).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@CASES
@given(
    length=LENGTHS,
    n_kv_heads=st.sampled_from([1, 2, 4]),
    run=st.integers(1, 99),
    packed=st.booleans(),
)
@FEWER
def test_fast_path_equals_reference(case, length, n_kv_heads, run, packed):
    layer = small_layer(case, n_kv_heads=n_kv_heads)
    torch.manual_seed(length)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    ids = None
    if packed:
        index = torch.arange(length)
        ids = torch.stack([index // run, index // 7]) % 3
        ids[:, run :: run + 5] = -1
    fast = results(layer, x, ids)
    with use_backend("reference"):
        assert_close(fast, results(layer, x, ids), rtol=1e-9, atol=1e-9)


@CASES
def test_gradients_are_those_of_finite_differences(case):
    layer = small_layer(case, d_model=4, n_heads=2, n_kv_heads=1)
    torch.manual_seed(0)
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0, 0, 1, 1, -1, 1]])
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        y, state = torch.func.functional_call(layer, given, (x[:, :4],))
        more, state = torch.func.functional_call(
            layer, given, (x[:, 4:], state), {"segment_ids": ids[:, 4:]}
        )
        return y, more, *(s for s in state if s.is_floating_point() and s.requires_grad)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
