"""A run that is killed and resumed gives bit for bit the losses of one that was not."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support.program import SMALL, fit, merged, scalars, start

from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoint_io import AtomicCheckpointIO

STEPS = 12
CASES = {
    # Dropout and drawn lengths: random numbers; workers; validation in between.
    "workers": (
        "--data.num_workers=2",
        "--data.persistent_workers=True",
        "--model.dropout=0.2",
        "--model.mixed_lengths=[16, 32, 64]",
        "--trainer.val_check_interval=5",
    ),
    # The state behind a batch; accumulated gradients; several epochs of few documents.
    "state": (
        "--data.carry_state=True",
        "--trainer.accumulate_grad_batches=2",
        "--data.dataset_config=3",
        "--data.seq_len=512",
        "--model.window_size=16",
        "--model.window_curriculum={0: 8, 7: 16}",
    ),
    "stream": ("--data.streaming=True", "--trainer.accumulate_grad_batches=2"),
}


# The others are also among the kinds of kill_campaign.py; test_data_flags.py resumes them unkilled.
@pytest.mark.parametrize(
    "case", [c if c == "state" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_killed_and_resumed_is_bit_for_bit_the_same(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = f"--trainer.max_steps={STEPS}"
    flags = merged(*SMALL, *CASES[case], steps, "--checkpoint.every_n_steps=2")
    fit(*flags, "--trainer.default_root_dir=whole")
    process = start(*flags, "--trainer.default_root_dir=killed", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("step 5 "):  # not at a checkpoint
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    newest = newest_checkpoint("killed")
    assert newest.name in ("step=00000002.ckpt", "step=00000004.ckpt", "step=00000006.ckpt")
    fit(*flags, "--trainer.default_root_dir=killed", "--ckpt_path=last")
    resumed = scalars(tmp_path / "killed", version=1)
    assert min(resumed) == int(newest.stem[5:]) + 1
    expected, got = scalars(tmp_path / "whole"), scalars(tmp_path / "killed")
    assert list(expected) == list(range(1, STEPS + 1))
    assert {step: got.get(step) for step in expected} == expected
    weights = [
        torch.load(tmp_path / root / f"checkpoints/step={STEPS:08d}.ckpt", weights_only=True)
        for root in ("whole", "killed")
    ]
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][name]), name


def test_every_state_is_needed(tmp_path, monkeypatch):
    """The comparison above would notice: with other randomness the losses differ."""
    monkeypatch.chdir(tmp_path)
    flags = merged(*SMALL, *CASES["workers"], "--data.num_workers=0", "--trainer.max_steps=2")
    flags.remove("--data.persistent_workers=True")
    fit(*flags, "--trainer.default_root_dir=one")
    fit(*flags, "--trainer.default_root_dir=other", "--seed_everything=1")
    assert scalars(tmp_path / "one") != scalars(tmp_path / "other")


def test_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    code = (
        "import torch; from longctx_layers.training.checkpoint_io import AtomicCheckpointIO\n"
        "io, n = AtomicCheckpointIO(), 0\n"
        "while True:\n"
        "    io.save_checkpoint({'n': n, 'x': torch.full((1 << 20,), n)}, 'run/c.ckpt')\n"
        "    n += 1; print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        process.stdout.readline()
    process.kill()  # in the midst of another
    process.wait()
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "run/c.ckpt")
    assert saved["n"] >= 2
    assert torch.equal(saved["x"], torch.full((1 << 20,), saved["n"]))


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "c.ckpt"
    io.save_checkpoint({"n": 1}, path)
    with pytest.raises(AttributeError):
        io.save_checkpoint({"n": 2, "x": lambda: None}, path)
    assert io.load_checkpoint(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.ckpt"]


@pytest.mark.parametrize("flipped", ["global_step", "run", "weights"])
def test_a_flipped_bit_in_the_newest_checkpoint_is_reported(flipped, tmp_path):
    """Also where the file still loads, and says that it is of another step or run."""
    paths = {step: tmp_path / f"checkpoints/step={step:08d}.ckpt" for step in (2, 4, 6)}
    for step, path in paths.items():
        saved = {"callbacks": {"Checkpoints": {"run": "abab"}}, "x": torch.full((64,), float(step))}
        AtomicCheckpointIO().save_checkpoint({"global_step": step, **saved}, path)
        os.utime(path, (step, step))
    assert newest_checkpoint(tmp_path) == paths[6]
    content = bytearray(paths[6].read_bytes())
    marks = {
        "global_step": b"K\x06",  # how pickle writes 6; the flipped bit makes it 2
        "run": b"\x61bab",
        "weights": torch.tensor(6.0).numpy().tobytes(),
    }
    place = content.index(marks[flipped], content.index(b"global_step"))
    content[place + (flipped == "global_step")] ^= 4
    paths[6].write_bytes(content)
    os.utime(paths[6], (6, 6))
    expected = f"got {paths[6]}, which has changed .*; the newest intact one is {paths[4]}:"
    with pytest.raises(ValueError, match=expected):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path, skip_damaged=True) == paths[4]


def test_loading_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"state_dict": Harmful()}, tmp_path / "c.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "c.ckpt")


def test_last_without_a_checkpoint_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit(*SMALL, "--ckpt_path=last").trainer.global_step == 2
    assert "none under logs yet, so this run starts" in capsys.readouterr().out
    # A complete run ends at once.
    assert fit(*SMALL, "--ckpt_path=last").trainer.global_step == 2


def test_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = merged(*SMALL, "--trainer.max_steps=5")
    fit(*flags, "--checkpoint.every_n_steps=2", "--checkpoint.keep=2")
    kept = sorted(path.name for path in (tmp_path / "logs/checkpoints").iterdir())
    assert kept == ["step=00000004.ckpt", "step=00000005.ckpt"]
