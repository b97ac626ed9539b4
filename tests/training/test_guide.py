"""Every command of the training guide: parsed and checked as written, and run, only smaller."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from support.guide_commands import EVALUATIONS, FITS, FLAGS, OTHERS
from support.guide_table import (
    HEADING,
    PAGE,
    SHORTER,
    rows,
    shrunk,
    shrunk_evaluation,
    table_rows,
)
from support.program import (
    ROOT,
    SMALL,
    check,
    finish,
    fit,
    local_text,
    local_wikitext,
    merged,
    scalars,
    start,
)

from longctx_layers import create_model
from longctx_layers.data.tokenizers import ByteTokenizer
from longctx_layers.evals.program.options import parse as parse_evaluation
from longctx_layers.evals.scoring import doubling
from longctx_layers.evals.synthetic import main as evaluate

ON_GPU = torch.cuda.is_available()
DISTINCT = list(dict.fromkeys(shrunk(one.flags) for one in FITS))
# One of each block, and the debug mode; the guide's first command stands for its dataset too.
FAST = [DISTINCT[0], *(DISTINCT[i] for i in (3, 6, 9, 12)), shrunk(FITS[16].flags)]


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local_text(tmp_path / "path/to/data")


@pytest.mark.parametrize("command", FITS, ids=lambda one: " ".join(one.flags[:2]))
def test_command_is_accepted_as_written(command, capsys):
    flags = [f for f in command.flags if f != "--trainer.accelerator=gpu" or ON_GPU]
    cli = check(*flags)
    options = cli.model.hparams
    model_flags = [f.removeprefix("--model.") for f in flags if f.startswith("--model.")]
    expected = dict(flag.split("=") for flag in model_flags)
    assert {name: str(options[name]) for name in expected} == expected
    steps = 1 if cli.trainer.fast_dev_run else re.search(r"max_steps=(\d+)", " ".join(flags))[1]
    assert cli.trainer.max_steps == int(steps)
    assert f"seq_len={cli.datamodule.seq_len}" in " ".join(flags)
    if flags != list(command.flags):  # here, the whole command ends with a clear error
        with pytest.raises(SystemExit):
            check(*command.flags)
        assert "--trainer.accelerator=gpu: torch" in capsys.readouterr().err


@pytest.mark.parametrize("extra", FLAGS, ids=lambda one: " ".join(one.flags))
def test_flags_are_accepted_as_written(extra, capsys):
    if "deepspeed" in extra.flags[0] and not (find_spec("deepspeed") and ON_GPU):
        with pytest.raises(SystemExit):
            check(*extra.flags)
        assert "deepspeed" in capsys.readouterr().err
    else:
        check(*extra.flags)


@pytest.mark.parametrize("flags", FAST, ids=" ".join)
def test_distinct_command_runs(flags, tmp_path):
    runs_and_learns(flags, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f for f in DISTINCT if f not in FAST], ids=" ".join)
def test_every_distinct_command_runs(flags, tmp_path):
    runs_and_learns(flags, tmp_path)


def runs_and_learns(flags, tmp_path):
    local_wikitext(tmp_path)
    cli = fit(*merged(*SMALL[5:], *flags))
    (root,) = {cli.trainer.default_root_dir}
    if cli.trainer.fast_dev_run:
        assert cli.trainer.global_step == 1
        return
    losses = scalars(tmp_path / root)
    assert list(losses) == [1, 2]
    assert losses[2] < losses[1]
    assert list((tmp_path / root / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("extra", FLAGS, ids=lambda one: " ".join(one.flags))
def test_flags_run(extra, tmp_path):
    local_wikitext(tmp_path)
    flags = merged(*SMALL, *(shrunk(extra.flags)))
    if "deepspeed" in extra.flags[0]:
        pytest.skip("needs the extra and a GPU; test_flags_are_accepted_as_written has the error")
    if extra.flags == ("--trainer.devices=2",):
        finish(start(*flags, cwd=tmp_path))
    else:
        fit(*flags)
    assert scalars(tmp_path / "logs")[2] > 0


def a_checkpoint(folder):
    """A folder as `save_pretrained` and the tokenizer write it, where the guide has one."""
    create_model(257, "tiny", "dpassm", {"window_size": 16}).save_pretrained(folder)
    ByteTokenizer().save(folder)


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda one: " ".join(one.flags))
def test_evaluation_is_accepted_as_written_and_runs(command, tmp_path, capsys):
    a_checkpoint(tmp_path / "path/to/checkpoint")
    if ON_GPU:
        parse_evaluation(command.flags)
    else:  # here, the whole command ends with a clear error
        with pytest.raises(ValueError, match="--device=cuda: torch .* finds no GPU"):
            parse_evaluation(command.flags)
        parse_evaluation([*command.flags, "--device", "cpu"])
    measured = evaluate(shrunk_evaluation(command.flags))
    printed = capsys.readouterr().out
    flags = dict(zip(command.flags[::2], command.flags[1::2], strict=False))
    assert measured[0]["task"] == flags["--task"]
    assert measured[0]["block"] == flags.get("--block", "dpassm")
    lengths = [int(flags[name]) // SHORTER for name in ("--seq_len", "--max_len")]
    assert [row["length"] for row in measured] == doubling(*lengths)
    trained = "path/to/checkpoint" in " ".join(command.flags)
    assert ("NOT TRAINED" in printed) != trained
    assert all(row["trained"] == trained for row in measured)


@pytest.mark.parametrize("other", OTHERS, ids=lambda one: one.command.strip()[:60])
def test_other_command_is_as_described(other, tmp_path):
    if other.kind == "python":
        done = subprocess.run([sys.executable, "-c", other.command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "parameters" in other.command:
            count = int(done.stdout.split()[-1].replace(",", ""))
            assert abs(count - 150e6) < 1.5e6
        if "Output shape" in other.command:
            assert "[2, 64, 1000]" in done.stdout
    elif other.kind == "make":
        target = other.command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif other.kind == "file":
        program = ROOT / other.command.partition(" ")[0]
        assert program.is_file()
        assert program.suffix == ".py" or os.access(program, os.X_OK)
    else:
        assert other.kind in ("system", "help")  # `help` is in test_cli.py


def test_evaluation_pipeline_runs_the_listed_command_for_each_checkpoint(tmp_path):
    script = tmp_path / "examples/evaluate_all_models.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "examples/evaluate_all_models.sh", script)
    printer = tmp_path / "printer"
    printer.write_text('#!/bin/bash\necho "$@"\n')
    printer.chmod(0o755)

    def run(*further):
        environ = {**os.environ, "PYTHON": str(printer)}
        return subprocess.run([script, *further], env=environ, capture_output=True, text=True)

    done = run()
    assert done.returncode == 1
    assert "no logs/*/checkpoints/*.ckpt" in done.stderr
    checkpoints = [f"logs/{run}/checkpoints/step=2.ckpt" for run in ("a", "b")]
    for checkpoint in checkpoints:
        (tmp_path / checkpoint).parent.mkdir(parents=True)
        (tmp_path / checkpoint).touch()
    done = run("--n", "4")
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("examples/")]
    (listed,) = (one.flags for one in EVALUATIONS if one.section == "evaluate_all_models.sh")
    command = f"examples/evaluate.py {' '.join(listed)} --n 4"
    assert ran == [command.replace("path/to/checkpoint", one) for one in checkpoints]


def test_training_pipeline_runs_the_listed_commands(tmp_path):
    # An interpreter that prints its arguments stands in for Python.
    printer = tmp_path / "printer"
    printer.write_text('#!/bin/bash\necho "$@"\n')
    printer.chmod(0o755)
    done = subprocess.run(
        [ROOT / "examples/train_all_models.sh"],
        env={**os.environ, "PYTHON": str(printer)},
        capture_output=True,
        text=True,
        check=True,
    )
    ran = [line.split() for line in done.stdout.splitlines() if line.startswith("examples/")]
    listed = [one.flags for one in FITS if one.section == "train_all_models.sh"]
    assert ran == [["examples/train.py", "fit", *flags, "--ckpt_path=last"] for flags in listed]


def test_committed_table_lists_every_command():
    commands = [command for command, _ in table_rows(PAGE.read_text())]
    assert commands == [command for _, command in rows()]
    assert PAGE.read_text().startswith(HEADING)
    assert "reports/training/guide.md" in (ROOT / "docs/training.md").read_text()
