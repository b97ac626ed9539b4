"""Triton's operators: gradients of gradients, and hooks on what their backward passes keep."""

import pytest
from support.derivative_cases import (
    SECOND_ORDER,
    assert_hooks_are_harmless,
    assert_second_order,
    assert_short_second_order,
)

CASES = pytest.mark.parametrize("case", SECOND_ORDER)
pytestmark = pytest.mark.usefixtures("interpret")


@CASES
def test_short_calls(case):
    assert_short_second_order(case, "triton")


@pytest.mark.slow
@CASES
def test_second_order(case):
    assert_second_order(case, "triton")


@pytest.mark.slow
@CASES
def test_hooks_on_saved_tensors(case):
    assert_hooks_are_harmless(case, "triton")
