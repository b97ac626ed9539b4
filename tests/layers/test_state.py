"""The helpers beside the state: begin, cut the gradient, choose rows, move."""

import pytest
import torch
from torch.testing import assert_close

from longctx_layers import detach_state, select_rows, state_to
from longctx_layers.testing import LAYER_CASES, small_layer

CASES = pytest.mark.parametrize("case", LAYER_CASES)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 12, 16, generator=generator, dtype=torch.float64)


@CASES
def test_the_empty_state_is_none(case, inputs):
    layer = small_layer(case)
    ids = torch.tensor([[0] * 12, [-1] * 5 + [3] * 7, [0] * 4 + [1] * 8])
    for segment_ids in (None, ids):
        with_state = layer(inputs, layer.init_state(3), segment_ids=segment_ids)
        assert_close(with_state, layer(inputs, segment_ids=segment_ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "module"), [("vanilla", "base"), ("bigbird", "base"), ("window", "longformer")]
)
def test_states_load_that_were_saved_when_their_class_was_elsewhere(case, module, inputs, tmp_path):
    layer = small_layer(case)
    _, state = layer(inputs)
    kind = type(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__module__", f"longctx_layers.layers.{module}")
        torch.save(state, tmp_path / "state.pt")
    for weights_only in (True, False):
        loaded = torch.load(tmp_path / "state.pt", weights_only=weights_only)
        assert type(loaded) is kind
        assert_close(loaded, state, rtol=0, atol=0)


@CASES
def test_rows_may_be_reordered_dropped_and_repeated(case, inputs):
    layer, index = small_layer(case), torch.tensor([2, 0, 0, 1])
    ids = torch.tensor([[0] * 7, [-1] * 5 + [3] * 2, [0] * 4 + [1] * 3])
    _, state = layer(inputs[:, :7], segment_ids=ids)
    y, after = layer(inputs[:, 7:], state)
    chosen = layer(inputs[index, 7:], select_rows(state, index))
    assert_close(chosen, (y[index], select_rows(after, index)), rtol=1e-12, atol=1e-12)


@CASES
def test_a_detached_state_cuts_the_gradient_and_nothing_else(case, inputs):
    layer = small_layer(case)
    x = inputs.requires_grad_()
    _, state = layer(x[:, :7])
    detached = detach_state(state)
    assert type(detached) is layer.state_type
    assert not any(s.requires_grad for s in detached)
    y, _ = layer(x[:, 7:], detached)
    assert_close(y, layer(x[:, 7:], state)[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient[:, :7].eq(0).all()
    assert gradient[:, 7:].ne(0).any()


@CASES
def test_a_state_moves_to_a_device(case):
    layer = small_layer(case)
    moved = state_to(layer.init_state(2), "meta")
    assert type(moved) is layer.state_type
    assert {s.device.type for s in moved} == {"meta"}
    assert {s.device.type for s in layer.init_state(2, device="meta")} == {"meta"}


def test_helpers_take_the_states_of_many_layers():
    layers = [small_layer(case) for case in ("dpassm", "blade")]
    states = tuple(layer.init_state(3) for layer in layers)
    chosen = select_rows(states, torch.tensor([1]))
    assert [type(s) for s in chosen] == [layer.state_type for layer in layers]
    assert all(len(tensor) == 1 for state in chosen for tensor in state)
