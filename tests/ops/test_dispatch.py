"""Backends: what runs, what is refused, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from longctx_layers import explain, use_backend
from longctx_layers.ops import ssd
from longctx_layers.ops.dispatch import Operation


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x, dt, B = torch.randn(1, 9, 2, 4), torch.rand(1, 9, 2), torch.randn(1, 9, 3)
    return tuple(z.to(dtype) for z in (x, dt, -torch.rand(2), B, torch.randn(1, 9, 3)))


def chosen() -> str:
    (row,) = [row for row in explain(ssd, *arguments()) if row.chosen]
    return row.backend


def test_auto_takes_the_fast_path_and_never_the_reference():
    assert chosen() == "torch"
    operation = Operation("only_a_reference")
    operation.register("reference")(lambda x: x)
    with pytest.raises(ValueError, match="only_a_reference: expected a backend"):
        operation(torch.zeros(1))


def test_a_backend_asked_for_runs_or_raises():
    with use_backend("reference"):
        assert chosen() == "reference"
    assert chosen() == "torch"
    with use_backend("triton"), pytest.raises(ValueError, match="got 'triton'"):
        ssd(*arguments())
    operation = Operation("picky")
    operation.register("torch", refuse=lambda x: "too small")(lambda x: x)
    with pytest.raises(ValueError, match="too small"):
        operation(torch.zeros(1), backend="torch")


def test_unknown_backends_are_refused_by_name():
    with pytest.raises(ValueError, match=r"expected a backend out of .*'torch'.*got 'tirton'"):
        ssd(*arguments(), backend="tirton")
    with pytest.raises(ValueError, match="use_backend"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "-> ssd                  reference"), ("fast", "'fast'")]
)
def test_environment_variable(value, expected):
    command = [sys.executable, "-m", "longctx_layers.info"]
    run = subprocess.run(
        command, env={**os.environ, "LONGCTX_BACKEND": value}, capture_output=True, text=True
    )
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value == "reference")


def test_operations_choose_their_own_precision():
    inputs = arguments()
    expected, state = ssd(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, other = ssd(*inputs)
    assert torch.equal(actual, expected)
    assert torch.equal(state, other)
