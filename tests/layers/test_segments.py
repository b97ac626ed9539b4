"""Segments and pads: packed documents are separate ones, and pads do not exist."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, assert_packs, small_layer

FEWER = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))
CASES = pytest.mark.parametrize("case", LAYER_CASES)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def inputs(length, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)


def streamed(layer, x, ids):
    """One token a call."""
    ys, state = [], None
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state, segment_ids=ids[:, t : t + 1])
        ys.append(y)
    return torch.cat(ys, 1), state


@CASES
@given(lengths=st.lists(st.integers(1, 12) | st.integers(66, 140), min_size=1, max_size=4))
@FEWER
def test_packed_documents_equal_separate_ones(case, lengths):
    assert_packs(small_layer(case), inputs(sum(lengths)), lengths)


@CASES
@given(pads=st.lists(st.integers(0, 20), min_size=1, max_size=9), split=st.booleans())
@FEWER
def test_pads_do_not_exist(case, pads, split):
    """At the left, at the right and inside, whatever stands at them, NaN included."""
    layer = small_layer(case)
    dense, more = inputs(16), inputs(5, seed=1)
    keep = torch.ones(16 + len(pads), dtype=torch.bool)
    for place in pads:
        keep[next(i % len(keep) for i in range(place, 99) if keep[i % len(keep)])] = False
    padded = torch.full((1, len(keep), 16), float("nan"), dtype=torch.float64)
    padded[:, keep] = dense
    padded.requires_grad_()
    dense.requires_grad_()
    ids = torch.where(keep, 0, -3)[None]
    y, state = streamed(layer, padded, ids) if split else layer(padded, segment_ids=ids)
    expected, expected_state = layer(dense)
    assert y[:, ~keep].eq(0).all()
    assert_close(y[:, keep], expected, **EXACT)
    # Vanilla and BigBird keep a slot for each pad, out of every query's sight.
    for name in set(state._fields) - {"k", "v"}:
        assert_close(getattr(state, name), getattr(expected_state, name), **EXACT)
    assert_close(layer(more, state)[0], layer(more, expected_state)[0], **EXACT)

    of_padded = torch.autograd.grad(y.square().sum(), [padded, *layer.parameters()])
    of_dense = torch.autograd.grad(expected.square().sum(), [dense, *layer.parameters()])
    assert of_padded[0][:, ~keep].eq(0).all()
    assert_close((of_padded[0][:, keep], *of_padded[1:]), of_dense, **EXACT)


@CASES
def test_rows_of_pads_alone_leave_the_state_as_it_is(case):
    layer = small_layer(case)
    _, state = layer(inputs(7, batch=2))
    y, after = layer(inputs(3, batch=2), state, segment_ids=torch.full((2, 3), -1))
    assert y.eq(0).all()
    constant = [n for n in state._fields if getattr(state, n).shape == getattr(after, n).shape]
    for name in constant:
        assert_close(getattr(after, name), getattr(state, name), **EXACT)
    more = inputs(4, batch=2, seed=1)
    assert_close(layer(more, after)[0], layer(more, state)[0], **EXACT)
    beginning = layer(inputs(3, batch=2), segment_ids=torch.full((2, 3), -1))[1]
    assert_close(layer(more, beginning)[0], layer(more)[0], **EXACT)


@CASES
def test_an_id_that_returns_begins_a_new_segment(case):
    layer = small_layer(case)
    x = inputs(4)
    y, _ = layer(x, segment_ids=torch.tensor([[0, 0, 1, 0]]))
    three = [layer(part)[0] for part in (x[:, :2], x[:, 2:3], x[:, 3:])]
    assert_close(y, torch.cat(three, 1), **EXACT)


@CASES
@pytest.mark.parametrize("batch_ids", [[5], [5, 2]])
def test_a_segment_goes_on_in_the_next_call(case, batch_ids):
    layer = small_layer(case)
    row_ids = torch.tensor(batch_ids)[:, None]
    x = inputs(11, batch=len(batch_ids))
    _, state = layer(x[:, :6], segment_ids=row_ids.expand(-1, 6))
    assert_close(state.segment, row_ids[:, 0])
    whole = layer(x)[0][:, 6:]
    same, kept = layer(x[:, 6:], state, segment_ids=row_ids.expand(-1, 5))
    held, held_state = layer(x[:, 6:], state)
    assert_close(same, whole, **EXACT)
    assert_close(held, whole, **EXACT)
    assert_close(held_state, kept, **EXACT)
    new, _ = layer(x[:, 6:], state, segment_ids=row_ids.expand(-1, 5) + 1)
    assert_close(new, layer(x[:, 6:])[0], **EXACT)
    # Pads between the calls do not end a segment either.
    ids = torch.cat([row_ids.new_full((len(x), 1), -1), row_ids.expand(-1, 4)], 1)
    assert_close(
        layer(x[:, 6:], state, segment_ids=ids)[0][:, 1:], layer(x[:, 7:], state)[0], **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_ids_may_be_any_integers(dtype):
    layer = small_layer("dpassm")
    x, ids = inputs(6), torch.tensor([[0, 0, 7, 7, -2, 7]])
    y, state = layer(x, segment_ids=ids.to(dtype))
    assert_close((y, state), layer(x, segment_ids=ids))
    assert state.segment.dtype == torch.int64
