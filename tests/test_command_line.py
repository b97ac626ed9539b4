"""What the command-line programs share: how they are called in usage texts."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from longctx_layers.command_line import program_name
from longctx_layers.evals.program.options import parser as evaluation
from longctx_layers.reports.flags import parser as report


@pytest.mark.parametrize(
    ("script", "spec", "expected"),
    [
        ("/usr/bin/longctx", None, "longctx report"),
        ("longctx.exe", None, "longctx report"),
        (
            "x/reports/__main__.py",
            "longctx_layers.reports.__main__",
            "python -m longctx_layers.reports",
        ),
        ("examples/report.py", None, "python examples/report.py"),
        ("examples/report.py", "another.module", "python examples/report.py"),
    ],
)
def test_programs_are_called_as_they_were_started(script, spec, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    module = spec and ModuleSpec(spec, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module, raising=False)
    assert program_name("longctx_layers.reports", "report") == expected
    program = report()
    with pytest.raises(SystemExit):
        program.parse_args(["--checkpoint_pathh", "a", "--checkpoint_path", "b"])
    assert capsys.readouterr().err.startswith(f"{expected}: error: unrecognized arguments")


def test_hyphens_are_accepted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longctx"])
    flags = evaluation().parse_args(["--task", "passkey", "--seq-len=64", "--no-probe"])
    assert (flags.seq_len, flags.no_probe) == (64, True)


def test_the_closest_value_is_named(capsys):
    with pytest.raises(SystemExit):
        evaluation().parse_args(["--task", "paskey"])
    assert "did you mean 'passkey'?" in capsys.readouterr().err
