"""`selfcheck` finds the backends that run here right, and a wrong one wrong."""

import sys
from functools import partial

import pytest
import torch

import longctx_layers
from longctx_layers import self_check


def test_all_backends_of_this_machine_are_right():
    found = list(self_check.checks("cpu", length=70, dtypes=(torch.float32, torch.bfloat16)))
    ran = {check.case for check in found if check.output is not None}
    assert ran == set(self_check._cases(70))
    assert not [check for check in found if check.failed]
    refused = [check for check in found if check.backend == "triton"]
    assert refused
    assert all("needs a GPU" in check.reason for check in refused)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_backend_is_found(monkeypatch, capsys, factor):
    backends = sys.modules["longctx_layers.ops.gated_norms"]._operation.backends
    right = backends["torch"]
    wrong = right._replace(run=lambda *args, **kwargs: factor * right.run(*args, **kwargs))
    monkeypatch.setitem(backends, "torch", wrong)
    few = partial(self_check.checks, dtypes=(torch.float32,), length=70)
    monkeypatch.setattr(self_check, "checks", few)
    assert not longctx_layers.selfcheck("cpu")
    table = capsys.readouterr().out
    assert table.count("WRONG") == 1
    assert "1 wrong" in table
