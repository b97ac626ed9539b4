"""What the launchers ask of torch and Triton before they launch."""

from types import SimpleNamespace

import pytest
import torch

from longctx_layers.kernels.target import DEFAULT, dot_precision, pick, target
from longctx_layers.ops import availability


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


@pytest.mark.parametrize(
    ("architecture", "right"),
    [("gfx942:sramecc+:xnack-", True), ("gfx950", True), ("gfx90a", True), ("gfx1100", False)],
)
def test_amd_gpus_on_which_registers_spill_are_refused(monkeypatch, architecture, right):
    properties = SimpleNamespace(major=9, gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(availability, "INSTALLED", True)
    monkeypatch.setattr(availability, "VERSION", availability.MINIMUM)
    reason = availability.refuse_device(torch.device("cuda"), torch.bfloat16)
    assert reason is None if right else "got gfx1100" in reason
