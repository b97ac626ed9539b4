"""What the launchers ask of torch and Triton before they launch."""

import pytest
import torch

from longctx_layers.kernels.target import DEFAULT, dot_precision, pick, target


def test_without_a_gpu_the_default_row():
    assert target() == DEFAULT
    assert pick({DEFAULT: 1, "sm_90": 2}) == 1


def test_float32_is_multiplied_as_torch_is_asked_to():
    assert dot_precision(torch.float32) == "tf32x3"
    assert dot_precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_the_newer_setting_counts_too(setting, expected):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("from torch 2.9 on")
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        assert dot_precision(torch.float32) == expected
    finally:
        matmul.fp32_precision = before
