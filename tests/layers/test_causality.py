"""No output depends on what comes later in its row, or on other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longctx_layers.testing import LAYER_CASES, assert_causal, small_layer

FEWER = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))


@pytest.mark.parametrize("case", LAYER_CASES)
@given(length=st.integers(2, 40) | st.integers(130, 140), data=st.data())
@FEWER
def test_later_inputs_change_nothing(case, length, data):
    layer = small_layer(case, n_kv_heads=2)
    t = data.draw(st.integers(1, length - 1))
    torch.manual_seed(length)
    assert_causal(layer, torch.randn(2, length, 16, dtype=torch.float64), t)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_later_segments_and_pads_change_nothing(case):
    layer = small_layer(case)
    torch.manual_seed(0)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    ids = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 1, -1, 1, 1, 1] + 8 * [1]])
    other = torch.cat([ids[:, :12], torch.tensor([[1, -1, 2, 2, 0, -1, 1, 1]])], 1)
    y, changed = (layer(x, segment_ids=i)[0][:, :12] for i in (ids, other))
    assert_close(changed, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("value", [0.0, 1e4, float("nan")])
def test_rows_do_not_notice_their_neighbours(case, value):
    """Bit for bit, in a first call and in a later one."""
    layer = small_layer(case, dtype=torch.float32)
    torch.manual_seed(0)
    x = torch.randn(3, 30, 16)
    ids = (torch.arange(30) // 11).expand(3, -1).clone()
    other, other_ids = x.clone(), ids.clone()
    other[::2] = value
    other_ids[0] = torch.arange(30) // 2
    other_ids[2, 5:] = -1

    def middle_row(x, ids):
        y, state = layer(x[:, :16], segment_ids=ids[:, :16])
        more, state = layer(x[:, 16:], state, segment_ids=ids[:, 16:])
        return [y[1], more[1], *(s[1] for s in state)], layer(x)[0][1]

    assert_close(middle_row(other, other_ids), middle_row(x, ids), rtol=0, atol=0)
