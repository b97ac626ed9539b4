"""What runs on a CPU equals its reference: outputs, states and all gradients.

"auto" is the hand-written path wherever that accepts the call, and the torch path elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import assert_as_precise, assert_equal_in_float64, cases

NAMES = pytest.mark.parametrize(
    "name", ["sparse_attention", "ssd", "block_ssd", "diagonal_scan", "conv_silu", "gated_norms"]
)
# Around the edges of blocks (16 to 128), of tiles (64), and of those of full attention (256).
EDGES = [1, 2, 5, 16, 17, 63, 64, 65, 127, 128, 129, 200, 255, 257]
MANY = [511, 512, 513, 1025]
HALVES = [torch.bfloat16, torch.float16]
FEWER = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))


@NAMES
@given(data=st.data())
def test_equal_in_float64(name, data):
    assert_equal_in_float64(name, data.draw(cases(name, EDGES)))


@NAMES
@given(data=st.data())
@settings(max_examples=4)
def test_equal_in_float64_over_many_tiles(name, data):
    assert_equal_in_float64(name, data.draw(cases(name, MANY)))


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@FEWER
def test_as_precise_as_the_reference(name, dtype, data):
    assert_as_precise(name, data.draw(cases(name, [1, 17, 65, 129])), dtype)


@pytest.mark.parametrize("name", ["sparse_attention", "ssd", "block_ssd", "gated_norms"])
@given(data=st.data())
@FEWER
def test_the_torch_path_is_equal_where_another_comes_first(name, data):
    assert_equal_in_float64(name, data.draw(cases(name, EDGES)), backend="torch")
    case = data.draw(cases(name, [1, 17, 65, 129]))
    assert_as_precise(name, case, data.draw(st.sampled_from(HALVES)), backend="torch")
