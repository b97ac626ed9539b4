"""The kernels, interpreted, equal the reference: outputs, states and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_as_precise, assert_equal_in_float64, cases

pytestmark = pytest.mark.usefixtures("interpret")

# Around the edges of the small programs that the fixture makes.
LENGTHS = {
    "conv_silu": [1, 2, 3, 5, 7, 8, 9, 17],
    "diagonal_scan": [1, 2, 15, 16, 17, 33, 40],
    "sparse_attention": [1, 2, 15, 16, 17, 33, 40],
    "gated_norms": [1, 2, 7, 8, 9, 17],
}
NAMES = pytest.mark.parametrize("name", LENGTHS)


@NAMES
@given(data=st.data())
def test_equal_in_float64(name, data):
    assert_equal_in_float64(name, data.draw(cases(name, LENGTHS[name])), backend="triton")


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=5)
def test_as_precise_as_the_reference(name, dtype, data):
    assert_as_precise(name, data.draw(cases(name, LENGTHS[name])), dtype, backend="triton")
