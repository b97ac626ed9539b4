"""The command line: defaults, environment, files, and errors before any data is touched."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar
from support.program import ROOT, SMALL, check, finish, fit, merged, scalars, start

from longctx_layers.data.module import LongContextData
from longctx_layers.training import cli as program


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.windw_size=3", "did you mean --model.window_size"),
        ("--model.windw_size=3", "Valid: --model.num_params --model.block --model.window_size"),
        ("--trainer.max_step=3", "did you mean --trainer.max_steps"),
        ("--data.seqlen=3", "did you mean --data.seq_len"),
        ("--model.windw-size=3", "did you mean --model.window_size"),
        ("--model.window_size=0", "window_size: expected at least 1, got 0"),
        ("--model.block=dpasm", "unknown layer 'dpasm'; did you mean 'dpassm'.*'blade'"),
        ("--model.num_params=100m", "num_params: expected one of .*'150m'"),
        ("--model.n_random_tokens=4", "n_random_tokens: no option of dpassm.*'window_size'"),
        ("--model.chunk_size=4", "chunk_size: no option of dpassm"),
        ("--model.block_kwargs={windw: 4}", "dpassm has no options .*'window_size'"),
        ("--model.pattern=[dpassm, vanila]", "unknown layer 'vanila'; did you mean 'vanilla'"),
        ("--model.optimizer=Adan", "optimizer: expected one of .*'AdamW'"),
        ("--model.learning_rate=fast", "model.learning_rate.*\n.*float"),
        ("--model.learning_rate=-1", "learning_rate: expected a number of at least 0"),
        ("--model.dropout=1", "dropout: expected a number from 0 to 1"),
        ("--model.final_learning_rate=2", "expected a number from 0 to 1, got 2"),
        ("--model.mixed_lengths=[48]", "mixed_lengths: expected divisors of .* 64"),
        ("--model.length_curriculum={5: 32}", "0 included"),
        ("--trainer.strategy=deepspeed_stage_2", "deepspeed"),
        ("--trainer.strategy=nonsense", "nonsense"),
        ("--trainer.precision=3", "precision"),
        ("--data.max_seq_len=128", "seq_len, max_seq_len: two names of one option"),
    ],
)
def test_error_before_any_data_is_touched(flag, message, capsys, monkeypatch):
    monkeypatch.setattr(LongContextData, "prepare_data", lambda _: pytest.fail("data touched"))
    monkeypatch.setattr(LongContextData, "setup", lambda *_: pytest.fail("data touched"))
    with pytest.raises(SystemExit) as ended:
        fit(*SMALL, flag)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert re.search(message, said, re.DOTALL), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.max_time=00:01:00:00"], "no number of epochs; pass --trainer.max_steps or"),
        (["--trainer.max_epochs=-1"], "no number of epochs; pass --trainer.max_steps or"),
        (["--data.streaming=True", "--trainer.max_epochs=2"], "or --trainer.limit_train_batches"),
        (["--data.streaming=True"], "or --trainer.limit_train_batches"),
    ],
)
def test_the_number_of_steps_must_be_known(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(LongContextData, "prepare_data", lambda _: pytest.fail("data touched"))
    flags = merged(*SMALL, "--trainer.max_steps=-1", *flags)
    with pytest.raises(SystemExit) as ended:
        fit(*flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: --trainer.max_steps: expected a number, since the learning rate") == 1
    assert message in said


def test_carried_state_refuses_other_lengths(capsys):
    with pytest.raises(SystemExit):
        check(*SMALL, "--data.carry_state=True", "--model.mixed_lengths=[32, 64]")
    assert "leave one of them out" in capsys.readouterr().err


def test_gpu_is_asked_for_and_absent(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        check(*merged(*SMALL, "--trainer.accelerator=gpu"))
    said = capsys.readouterr().err
    assert "finds no GPU on this machine; use --trainer.accelerator=cpu" in said


def test_precision_16_on_a_cpu_is_bf16(capsys):
    cli = fit(*SMALL, "--trainer.precision=16")
    assert cli.trainer.precision == "bf16-mixed"
    assert (
        "--trainer.precision=16: bf16-mixed, since this runs on the CPU" in capsys.readouterr().out
    )
    assert scalars(Path("logs"))[2] > 0


def test_defaults():
    cli = check()
    assert cli.trainer.max_steps == 100_000
    assert cli.trainer.num_devices == 1
    assert cli.trainer.default_root_dir == "logs"
    assert cli.datamodule.seq_len == 8192
    assert (cli.model.names, cli.model.hparams.num_params) == (("dpassm",), "150m")


def test_environment_config_and_flags_in_this_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCTX_FIT__MODEL__WINDOW_SIZE", "11")
    monkeypatch.setenv("LONGCTX_FIT__MODEL__LEARNING_RATE", "0.5")
    monkeypatch.setenv("LONGCTX_BACKEND", "torch")  # the library's own, no flag
    config = {"model": {"learning_rate": 0.25, "weight_decay": 0.125}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    options = check("--config=run.yaml", "--model.weight_decay=0.0625").model.hparams
    assert options.window_size == 11
    assert options.learning_rate == 0.25
    assert options.weight_decay == 0.0625


def test_saved_config_repeats_the_run(tmp_path):
    fit(*SMALL, "--model.window_size=8")
    config = tmp_path / "logs/lightning_logs/version_0/config.yaml"
    fit(f"--config={config}", "--trainer.default_root_dir=again")
    assert scalars(tmp_path / "again") == scalars(tmp_path / "logs")


def test_second_run_in_the_same_folder(tmp_path):
    fit(*SMALL)
    fit(*SMALL)
    assert len(list((tmp_path / "logs/lightning_logs").glob("version_*"))) == 2


@pytest.mark.parametrize(
    ("flags", "bar"),
    [
        (("--trainer.enable_progress_bar=True",), "TQDMProgressBar"),
        (("--trainer.enable_progress_bar=True", "--trainer.callbacks=[]"), "TQDMProgressBar"),
        (
            ("--trainer.enable_progress_bar=True", "--trainer.callbacks=[RichProgressBar]"),
            "RichProgressBar",
        ),
        (("--trainer.callbacks=[RichProgressBar]",), None),
        ((), None),
    ],
)
def test_one_bar_or_plain_lines(flags, bar, capsys):
    cli = fit(*merged(*SMALL, *flags))
    bars = [type(c).__name__ for c in cli.trainer.callbacks if isinstance(c, ProgressBar)]
    assert bars == ([bar] if bar else [])
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s  MFU" in line]
    assert len(lines) == (0 if bar else 2)


def test_module_form_and_help(tmp_path):
    """From an empty folder, as with an installed wheel."""
    command = [sys.executable, "-m", "longctx_layers.training.train", "fit", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    usage = " ".join(done.stdout.partition("\n\n")[0].split())
    assert "usage: python -m longctx_layers.training.train [options] fit" in usage
    flags = [line for line in done.stdout.splitlines() if "--model." in line]
    for name in ("num_params", "block", "window_size", "n_global_tokens", "compile"):
        assert any(f"--model.{name} " in line for line in flags), name


def test_script_is_the_same_program():
    assert runpy.run_path(str(ROOT / "examples/train.py"))["main"] is program.main


def test_name_under_which_it_was_started(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longctx", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert capsys.readouterr().out.startswith("usage: longctx train ")


def test_hyphens_in_flags():
    cli = check("--data.max-seq-len=96", "--model.window-size", "8", "--trainer.max-steps=7")
    assert cli.datamodule.seq_len == 96
    assert cli.model.block_kwargs == {"dpassm": {"window_size": 8}}
    assert cli.trainer.max_steps == 7


@pytest.mark.slow
def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    flags = merged(*SMALL, "--trainer.devices=2", "--trainer.strategy=ddp")
    program = [str(ROOT / "examples/train.py"), "fit", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *program], cwd=tmp_path, check=True, env=env)
    assert list(scalars(tmp_path / "logs")) == [1, 2]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path):
    finish(start(*SMALL, "--trainer.default_root_dir=plain", cwd=tmp_path))
    flags = ("--model.compile=True", "--trainer.default_root_dir=compiled")
    finish(start(*SMALL, *flags, cwd=tmp_path))
    plain, compiled = scalars(tmp_path / "plain"), scalars(tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-5)
