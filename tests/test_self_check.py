"""`selfcheck` finds the backends that run here right, and a wrong one wrong."""

import sys
from functools import partial

import pytest
import torch

import longctx_layers
from longctx_layers import self_check
from longctx_layers.ops import diagonal_scan, register_backend


def test_all_backends_of_this_machine_are_right():
    found = list(self_check.checks("cpu", length=70, dtypes=(torch.float32, torch.bfloat16)))
    ran = {check.case for check in found if check.output is not None}
    assert ran == set(self_check._cases(70))
    assert {case.split(":")[0] for case in ran} == {
        *("sparse_attention", "ssd", "block_ssd", "diagonal_scan", "conv_silu", "gated_norms")
    }
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


def test_a_third_party_s_backend_is_checked_too():
    def run(u, log_decay, **options):
        h, final = diagonal_scan(u, log_decay, **options, backend="torch")
        return h * 1.01, final

    with register_backend("diagonal_scan", "mine", run):
        found = self_check.checks("cpu", length=70, dtypes=(torch.float32,))
        rows = [check for check in found if check.backend == "mine"]
    assert {check.case for check in rows} == {"diagonal_scan", "diagonal_scan: packed"}
    assert all(check.failed for check in rows)
