"""When checkpoints are written, which are kept, and what is refused on resumption."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.program import ROOT, SMALL, fit, merged, scalars

from longctx_layers.training import checkpoint_io, cli
from longctx_layers.training.checkpoint_files import newest_checkpoint
from longctx_layers.training.checkpoint_io import AtomicCheckpointIO
from longctx_layers.training.module import LanguageModel

FLAGS = merged(*SMALL, "--model.block=window", "--model.window_size=8", "--data.seq_len=16")
ACCUMULATE = "--trainer.accumulate_grad_batches=2"


class KilledError(Exception):
    """In place of SIGKILL: nothing is written after it, either."""


def at(step, batch, then, method="training_step"):
    """Do something before a batch of a step, in the midst of which no checkpoint may be written."""
    original, seen = getattr(LanguageModel, method), []

    def patched(self, *args):
        seen.append(self.global_step)
        if self.global_step == step and seen.count(step) == batch + 1:
            then(self)
        return original(self, *args)

    return mock.patch.object(LanguageModel, method, patched)


def kill(module):
    raise KilledError


def names(root="logs"):
    return sorted(path.name for path in Path(root, "checkpoints").iterdir())


def weights(root, step):
    return torch.load(f"{root}/checkpoints/step={step:08d}.ckpt", weights_only=True)["state_dict"]


def test_second_kill_after_a_resumption(tmp_path, monkeypatch):
    """Killed between two batches of a step, and in a validation that a checkpoint waits for."""
    monkeypatch.chdir(tmp_path)
    flags = merged(
        *FLAGS, ACCUMULATE, "--trainer.max_steps=6", "--checkpoint.every_n_steps=2",
        "--trainer.val_check_interval=8",
    )  # fmt: skip
    fit(*flags, "--trainer.default_root_dir=whole")
    flags += ["--trainer.default_root_dir=killed", "--ckpt_path=last"]
    for step, batch, method in ((3, 1, "training_step"), (2, 1, "training_step"),
                                (4, 0, "validation_step")):  # fmt: skip
        with at(step, batch, kill, method), pytest.raises(KilledError):
            fit(*flags)
        assert names("killed") == ["step=00000002.ckpt"]
    fit(*flags)
    for name in ("train_loss", "val_loss"):
        assert scalars(tmp_path / "killed", name) == scalars(tmp_path / "whole", name), name
    assert 4 in scalars(tmp_path / "whole", "val_loss")
    assert names("killed") == names("whole") == [f"step={n:08d}.ckpt" for n in (2, 4, 6)]
    for name, value in weights("whole", 6).items():
        assert torch.equal(weights("killed", 6)[name], value), name


def test_requests_wait_for_the_end_of_a_step(tmp_path, monkeypatch):
    """SIGUSR1, and a stop by time or by a callback, between the two batches of a step."""
    monkeypatch.chdir(tmp_path)

    def ask(module):
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(module):
        module.trainer.should_stop = True

    before = signal.getsignal(signal.SIGUSR1)
    with at(1, 0, ask), at(3, 0, stop):
        made = fit(*merged(*FLAGS, ACCUMULATE, "--trainer.max_steps=9"))
    assert made.trainer.global_step == 4
    assert names() == ["step=00000002.ckpt", "step=00000004.ckpt"]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(*merged(*FLAGS, "--trainer.max_steps=3", "--checkpoint.every_n_steps=1"))
    return folder


@pytest.fixture
def copied(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *flags):
    """The message with which a run ends before its first step."""
    capsys.readouterr()
    with at(0, 0, kill), at(2, 0, kill), at(3, 0, kill), pytest.raises(SystemExit) as error:
        fit(*merged(*FLAGS, "--trainer.max_steps=4", *flags))
    return f"{error.value.code} {capsys.readouterr().err}"


def test_older_files_are_pruned_and_foreign_ones_left_alone(copied):
    """Across resumptions, after an earlier run in the same folder, and for a run that branches."""
    every = ("--checkpoint.every_n_steps=1", "--checkpoint.keep=2")
    Path("logs/checkpoints/mine.ckpt").write_bytes(b"notes")
    fit(*merged(*FLAGS, *every, "--trainer.max_steps=5", "--ckpt_path=last"))
    fit(*merged(*FLAGS, *every, "--trainer.max_steps=6", "--ckpt_path=last"))
    assert names() == ["mine.ckpt", "step=00000005.ckpt", "step=00000006.ckpt"]
    # Resumed from step 5, not the last one: the run branches off, and the other branch is kept.
    first = "--ckpt_path=logs/checkpoints/step=00000005.ckpt"
    fit(*merged(*FLAGS, *every, "--trainer.max_steps=7", first))
    own = ["step=00000006-v1.ckpt", "step=00000007.ckpt"]
    assert names() == ["mine.ckpt", *own[:1], "step=00000006.ckpt", *own[1:]]
    # A run from the start has fewer steps behind it, but it wrote last.
    fit(*merged(*FLAGS, *every, "--trainer.max_steps=1"))
    assert newest_checkpoint("logs").name == "step=00000001.ckpt"
    assert len(names()) == 5


def test_last_is_furthest_in_training(copied):
    for step in (3, 2, 1):  # the other way round in time
        os.utime(f"logs/checkpoints/step={step:08d}.ckpt", (9e8 - step, 9e8 - step))
    assert newest_checkpoint("logs").name == "step=00000003.ckpt"


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


DAMAGE = {
    "byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "cut short"),
    "empty": (lambda path: os.truncate(path, 0), "empty"),
    "changed": (flip, "has changed since it was written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_the_older_intact_one(kind, copied, capsys):
    damage, message = DAMAGE[kind]
    newest, older = (Path(f"logs/checkpoints/step=0000000{step}.ckpt") for step in (3, 2))
    written = newest.stat().st_mtime_ns
    damage(newest)
    os.utime(newest, ns=(written, written))  # as a disk damages it
    said = refused(capsys, "--ckpt_path=last")
    for part in (str(newest), message, f"newest intact one is {older}", "skip_damaged=True"):
        assert part in said
    assert newest_checkpoint("logs", skip_damaged=True) == older
    assert message in refused(capsys, f"--ckpt_path={newest}")
    with pytest.raises(ValueError, match=message):
        AtomicCheckpointIO().load_checkpoint(newest)
    damage(older)
    Path("logs/checkpoints/step=00000001.ckpt").unlink()
    assert "there is no intact one" in refused(
        capsys, "--ckpt_path=last", "--checkpoint.skip_damaged=True"
    )


def test_skipping_a_damaged_one_replaces_it(copied):
    os.truncate("logs/checkpoints/step=00000003.ckpt", 99)
    fit(
        *merged(*FLAGS, "--trainer.max_steps=3"),
        "--ckpt_path=last", "--checkpoint.skip_damaged=True",
    )  # fmt: skip
    assert newest_checkpoint("logs").name == "step=00000003.ckpt"


def test_options_that_the_checkpoint_overrules_are_refused(copied, capsys):
    said = refused(
        capsys, "--ckpt_path=last", "--model.window_size=4", "--model.learning_rate=0.5",
        "--seed_everything=3",
    )  # fmt: skip
    assert "--model.window_size=4 (the checkpoint has 8)" in said
    assert "--model.learning_rate=0.5 (the checkpoint has 0.001)" in said
    assert "--seed_everything=3 (it has 0)" in said
    assert "no such" not in said
    # What only says how it is computed may change.
    made = fit(*FLAGS, "--ckpt_path=last", "--model.gradient_checkpointing=True")
    assert made.model.model.gradient_checkpointing


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.separate_documents=False", "separate_documents True, this one has False"),
        ("--data.seq_len=32", "seq_len 16, this one has 32"),
        ("--data.batch_size=4", "batch_size x processes 2, this one has 4"),
        ("--data.dataset_config=20", "other documents or another tokenizer"),
        ("--data.tokenizer=bpe:300", "other documents or another tokenizer"),
        ("--data.streaming=True", "streaming False, this one has True"),
        ("--trainer.limit_train_batches=9", "limit_train_batches all, this one has 9"),
        ("--ckpt_path=logs/checkpoints/step=00000009.ckpt", "expected a file"),
    ],
)
def test_other_batches_are_refused(flag, message, copied, capsys):
    assert message in refused(capsys, "--ckpt_path=last", flag)


NUMERIC = {
    "accumulate_grad_batches": (2, "1, this one has 2: its steps"),
    "max_steps": (4, "3, this one has 4: its learning rate"),
    "precision": ("bf16-mixed", "32-true, this one has bf16-mixed: its numbers"),
    "gradient_clip_val": (0.5, "1.0, this one has 0.5: its gradients"),
    "gradient_clip_algorithm": ("value", "norm, this one has value: its gradients"),
}


def test_other_numbers_are_warned_of(copied, recwarn):
    """But neither what says the same in other words nor what an older checkpoint does not know."""

    def said(*flags):
        recwarn.clear()
        fit(*merged(*FLAGS, "--trainer.max_steps=3", "--trainer.default_root_dir=again", *flags))
        return [str(one.message) for one in recwarn if "the run to resume" in str(one.message)]

    path = Path("logs/checkpoints/step=00000002.ckpt")
    same = ("--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=norm")
    assert said(f"--ckpt_path={path}", *same) == []
    other = [f"--trainer.{name}={value}" for name, (value, _) in NUMERIC.items()]
    messages = said(f"--ckpt_path={path}", *other)
    assert len(messages) == len(NUMERIC)
    for message, (name, (_, expected)) in zip(messages, NUMERIC.items(), strict=True):
        assert message.startswith(f"{name}: the run to resume had {expected}")
    content = torch.load(path, weights_only=True)
    for name in NUMERIC:
        del content["longctx"][name]
    del content["LongContextData"]["order"]["limit_train_batches"]
    torch.save(content, "older.ckpt")
    assert said("--ckpt_path=older.ckpt", *other, "--trainer.limit_train_batches=9") == []
    assert 4 in scalars(Path("again"))


@pytest.mark.parametrize("change", ["within_step", "carried"])
def test_incomplete_states_are_refused(change, copied, capsys):
    path = Path("logs/checkpoints/step=00000003.ckpt")
    content = torch.load(path, weights_only=True)
    content["longctx"] |= {"within_step": True} if change == "within_step" else {"carried": [1, 2]}
    torch.save(content, path)
    message = {"within_step": "without the gradients", "carried": "states of 2 processes"}[change]
    assert message in refused(capsys, "--ckpt_path=last")


def validate(*flags):
    with mock.patch.object(sys, "argv", ["train.py", "validate", *flags]):
        cli.main()


def test_validate_says_the_step_and_refuses_another_tokenizer(copied, capsys):
    flags = [flag for flag in FLAGS if "window" not in flag and "num_params" not in flag]
    validate(*flags, "--ckpt_path=logs/checkpoints/step=00000002.ckpt")
    assert "step 2  val_loss" in capsys.readouterr().out
    assert 2 in scalars(Path("logs"), "val_loss")
    # As many ids, and others: learnt from other documents.
    content = torch.load("logs/checkpoints/step=00000002.ckpt", weights_only=True)
    content["longctx"]["tokenizer_fingerprint"] = "another"
    torch.save(content, "other.ckpt")
    with pytest.raises(SystemExit, match="expected the checkpoint's tokenizer"):
        validate(*flags, "--ckpt_path=other.ckpt")


def test_full_disk(copied, monkeypatch):
    def full(self, data):
        self.error = OSError(28, "No space left on device")
        raise self.error

    monkeypatch.setattr(checkpoint_io._Writer, "write", full)
    with pytest.raises(SystemExit) as error:
        fit(*merged(*FLAGS, "--trainer.max_steps=4", "--ckpt_path=last"))
    for part in ("step=00000004.ckpt", "No space left", "step=00000003.ckpt, is kept"):
        assert part in error.value.code
    assert [path.name for path in Path("logs/checkpoints").glob(".*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "accumulation", "incomplete accumulation", "carried state", "stream with carried state",
    "mixed lengths, several workers", "length curriculum, stream with workers", "two processes",
    "two processes, stream",
])  # fmt: skip
def test_kill_campaign(kind):
    done = subprocess.run(
        [sys.executable, "-m", "support.kill_campaign", "--kinds", kind, "--kills", "4"],
        cwd=ROOT / "tests",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout
