"""The kernels, interpreted, equal the reference: outputs, states and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import assert_as_precise, assert_equal_in_float64, cases
from support.sizes import LENGTHS

pytestmark = pytest.mark.usefixtures("interpret")

COSTLY = ("block_ssd", "sparse_attention", "ssd")  # seconds for an example
CHEAP = [name for name in LENGTHS if name not in COSTLY]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FEW = settings(max_examples=settings().max_examples // 8)
SOME = settings(max_examples=settings().max_examples // 2)


def check_equal(name, data):
    case = data.draw(cases(name, LENGTHS[name]))
    assert_equal_in_float64(name, case, backend="triton")


def check_precise(name, dtype, data):
    case = data.draw(cases(name, LENGTHS[name]))
    assert_as_precise(name, case, dtype, backend="triton")


@pytest.mark.parametrize("name", CHEAP)
@given(data=st.data())
@SOME
def test_equal_in_float64(name, data):
    check_equal(name, data)


@pytest.mark.parametrize("name", COSTLY)
@given(data=st.data())
@FEW
def test_costly_ones_equal_in_float64(name, data):
    check_equal(name, data)


@pytest.mark.parametrize("name", CHEAP)
@DTYPES
@given(data=st.data())
@settings(max_examples=5)
def test_as_precise_as_the_reference(name, dtype, data):
    check_precise(name, dtype, data)


# block_ssd runs the kernels of ssd, and more of each.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "ssd" else n for n in COSTLY]
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
@given(data=st.data())
@settings(max_examples=2)
def test_costly_ones_as_precise_as_the_reference(name, dtype, data):
    check_precise(name, dtype, data)
