"""The command `longctx`: it names its programs, runs them, and says what is missing."""

import sys

import pytest

from longctx_layers import cli


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        cli.main(arguments)
        shown = capsys.readouterr().out
        for name, command in cli.COMMANDS.items():
            assert f"  {name} " in shown
            assert command.purpose in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_a_help_under_its_own_name(name, capsys, monkeypatch):
    pytest.importorskip("lightning", reason="needs the extra `train`")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit) as exited:
        cli.main([name, "--help"])
    assert not exited.value.code
    assert f"usage: longctx {name}" in capsys.readouterr().out


def test_an_unknown_command_gets_the_closest():
    with pytest.raises(SystemExit, match=r"no command 'trian'; did you mean 'train'\?"):
        cli.main(["trian"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "lightning", None)
    for module in [name for name in sys.modules if name.startswith("longctx_layers.training")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match=r"needs lightning.*pip install 'longctx-layers\[train\]'"):
        cli.main(["train", "fit"])


def test_the_arguments_reach_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--task", "passkey", "--sequence_lenght", "8"])
    assert "longctx evaluate" in capsys.readouterr().err


def test_processes_for_other_devices_run_the_same_command(monkeypatch):
    launcher = pytest.importorskip("lightning.fabric.strategies.launchers.subprocess_script")
    from longctx_layers.training import train

    commands = []
    monkeypatch.setattr(train, "main", lambda: commands.append(launcher._basic_subprocess_cmd()))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    before = sys.modules["__main__"].__spec__
    cli.main(["train", "fit", "--trainer.devices=2"])
    module = "longctx_layers.training.train"
    assert list(commands[0]) == [sys.executable, "-m", module, "fit", "--trainer.devices=2"]
    assert sys.modules["__main__"].__spec__ is before
