"""Backends: what runs, what is refused, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from longctx_layers import explain, use_backend
from longctx_layers.ops import (
    BACKENDS,
    Choice,
    availability,
    diagonal_scan,
    register_backend,
    ssd,
)
from longctx_layers.ops.backends import Operation


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x, dt, B = torch.randn(1, 9, 2, 4), torch.rand(1, 9, 2), torch.randn(1, 9, 3)
    return tuple(z.to(dtype) for z in (x, dt, -torch.rand(2), B, torch.randn(1, 9, 3)))


def chosen() -> str:
    (row,) = [row for row in explain(ssd, *arguments()) if row.chosen]
    return row.backend


def test_auto_takes_the_fast_path_and_never_the_reference():
    assert chosen() == "cpu"
    operation = Operation("only_a_reference")
    operation.register("reference")(lambda x: x)
    with pytest.raises(ValueError, match="only_a_reference: expected a backend"):
        operation(torch.zeros(1))


def test_a_backend_asked_for_runs_or_raises():
    with use_backend("reference"):
        assert chosen() == "reference"
    assert chosen() == "cpu"
    with (
        use_backend("triton"),
        pytest.raises(
            ValueError, match="'triton' was asked for and can't run this call: needs a GPU"
        ),
    ):
        ssd(*arguments())
    operation = Operation("picky")
    operation.register("torch", refuse=lambda x: "too small")(lambda x: x)
    with pytest.raises(ValueError, match="too small"):
        operation(torch.zeros(1), backend="torch")


def test_a_reserved_backend_runs_when_asked_for():
    operation, x = Operation("slow_to_start"), torch.zeros(1)
    operation.register("flex", reserve=lambda x: "takes a while")(lambda x: "flex")
    operation.register("torch")(lambda x: "torch")
    assert operation(x) == "torch"
    assert operation(x, backend="flex") == "flex"
    rows = {row.backend: row for row in operation.choices(x)}
    assert (rows["flex"].chosen, rows["flex"].reason) == (False, "takes a while")
    assert rows["torch"].chosen
    (asked,) = [row for row in operation.choices(x, backend="flex") if row.chosen]
    assert asked.backend == "flex"


def test_unknown_backends_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'tirton', expected one of .*'torch'.*mean 'triton'"):
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


def test_questions_are_answered_under_a_backend_that_cannot_run():
    with use_backend("triton"):
        rows = explain(ssd, *arguments())
    assert [row.reason for row in rows if row.backend == "torch"] == ["'triton' was asked for"]
    assert not any(row.chosen for row in rows)


def test_an_empty_environment_variable_is_none():
    command = [sys.executable, "-c", "import longctx_layers"]
    subprocess.run(command, env={**os.environ, "LONGCTX_BACKEND": ""}, check=True)


@pytest.mark.parametrize(
    ("version", "capability", "needed"),
    [
        ((3, 7, 1), 9, None),
        ((3, 7, 0), 9, "3.7.1 on this GPU, got 3.7.0"),
        ((3, 6, 0), 8, None),
        ((3, 5, 1), None, "3.6 on this GPU, got 3.5.1"),
        ((4, 0), 9, None),
    ],
)
def test_triton_versions(version, capability, needed):
    reason = availability.refuse_version(version, capability)
    assert reason is None if needed is None else f"needs Triton {needed};" in reason


def test_the_override_accepts_every_triton_but_no_older_gpu(monkeypatch):
    refusal = availability.refuse_version((3, 6, 0), 9)
    assert f"set {availability.OVERRIDE}=1" in refusal
    monkeypatch.setattr(availability, "ANY_VERSION", True)
    assert availability.refuse_version((3, 6, 0), 9) is None
    assert availability.refuse_version((3, 5, 1), None) is None
    assert "compute capability 8" in availability.refuse_version((3, 6, 0), 7)


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("yes", "got 'yes'")])
def test_the_override_is_an_environment_variable(value, expected):
    code = "from longctx_layers.ops import availability; print(availability.ANY_VERSION)"
    environment = {**os.environ, availability.OVERRIDE: value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value == "1")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_override_is_off_by_default(value):
    assert availability._is_on(value) is False


def test_transforms_and_compilers_do_not_meet_the_cpu_path():
    x, *rest = arguments(torch.float64)

    def loss(x):
        return ssd(x, *rest)[0].square().sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    _, tangent = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.detach()), loss(x.detach()))
    with use_backend("torch"):  # which has second derivatives
        (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def reversed_cumsum(u, log_decay, *, initial_state, segments):
    """A third party's backend: without decay, in another order of summation."""
    total = u.sum(1)
    return total[:, None] - u.flip(1).cumsum(1).flip(1) + u + initial_state[:, None], (
        initial_state + total
    )


def needs_no_decay(u, log_decay, *, initial_state, segments):
    return "sums without decay only" if segments is not None or log_decay.any() else None


def scan_rows(rate: float = 0.0, **options) -> dict[str, Choice]:
    u = torch.arange(12.0).view(1, 6, 2)
    rows = explain(diagonal_scan, u, torch.full((2,), rate), **options)
    return {row.backend: row for row in rows}


@pytest.fixture
def registered():
    with register_backend("diagonal_scan", "cumsum", reversed_cumsum, needs_no_decay):
        yield
    assert "cumsum" not in scan_rows()


def test_a_third_party_s_backend_is_explained_and_selected(registered):
    rows = scan_rows()
    assert [*rows] == ["cumsum", *BACKENDS]
    assert (rows["cumsum"].chosen, rows["cumsum"].reason) == (True, "runs this call")
    assert rows["torch"].reason == "accepts the call, but a faster backend comes first"
    u = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    h, final = diagonal_scan(u, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(h, u.cumsum(1))
    torch.testing.assert_close(final, u.sum(1))
    # Second derivatives are those of the torch path, whatever the backend's backward keeps.
    (slope,) = torch.autograd.grad(h.square().sum(), u, create_graph=True)
    assert torch.autograd.grad(slope.sum(), u)[0].isfinite().all()
    # It is not asked about empty tensors.
    assert diagonal_scan(u[:, :0], torch.zeros(3, dtype=torch.float64))[0].shape == (2, 0, 3)


def test_a_third_party_s_backend_refuses_with_its_reason(registered):
    rows = scan_rows(-1.0)
    assert rows["cumsum"].reason == "sums without decay only"
    assert rows["torch"].chosen
    message = "'cumsum' was asked for and can't run this call: sums without decay only"
    with pytest.raises(ValueError, match=message):
        diagonal_scan(torch.zeros(1, 2, 3), -torch.ones(3), backend="cumsum")
    with use_backend("cumsum"):
        assert scan_rows()["cumsum"].chosen
        with pytest.raises(ValueError, match="ssd: expected a backend that implements this"):
            ssd(*arguments())


@pytest.mark.parametrize(
    ("before", "chosen", "reason"),
    [
        ("triton", "cumsum", "runs this call"),
        ("torch", "cumsum", "runs this call"),
        ("reference", "torch", "accepts the call, but a faster backend comes first"),
    ],
)
def test_a_third_party_s_backend_has_its_place(before, chosen, reason):
    options = {"before": before}
    with register_backend("diagonal_scan", "cumsum", reversed_cumsum, needs_no_decay, **options):
        rows = scan_rows()
        assert list(rows)[list(rows).index("cumsum") + 1] == before
        assert rows[chosen].chosen
        assert rows["cumsum"].reason == reason
        assert scan_rows(backend="cumsum")["cumsum"].chosen  # by name it runs anyway


def test_a_third_party_s_backend_may_be_reserved():
    options = {"reserve": lambda *_, **__: "takes a while to start"}
    handle = register_backend("diagonal_scan", "cumsum", reversed_cumsum, **options)
    assert scan_rows()["cumsum"].reason == "takes a while to start"
    assert scan_rows(backend="cumsum")["cumsum"].chosen
    handle.remove()
    handle.remove()
    assert [*scan_rows()] == list(BACKENDS)
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cumsum'"):
        use_backend("cumsum").__enter__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagonal_scn", "mine"), "unknown operation 'diagonal_scn'.*mean 'diagonal_scan'"),
        (("diagonal_scan", "torch"), "the name 'torch' is taken for diagonal_scan"),
        (("diagonal_scan", "auto"), "the name 'auto' is taken"),
    ],
)
def test_names_of_registrations(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_backend(*arguments, reversed_cumsum)
    with pytest.raises(ValueError, match="before='torhc' is unknown.*did you mean 'torch'"):
        register_backend("diagonal_scan", "mine", reversed_cumsum, before="torhc")


def test_a_compiled_call_notices_a_new_backend():
    compiled = torch.compile(diagonal_scan, backend="eager", fullgraph=True)
    inputs = torch.randn(1, 5, 2), torch.zeros(2)
    calls = []

    def run(u, log_decay, *, initial_state, segments):
        calls.append(u)
        return reversed_cumsum(u, log_decay, initial_state=initial_state, segments=segments)

    expected, _ = compiled(*inputs)
    with register_backend("diagonal_scan", "cumsum", run):
        torch.testing.assert_close(compiled(*inputs)[0], expected)
        assert calls
