"""Two processes on one machine: the losses of one process with the same global batch."""

import pytest
import torch
from support.program import SMALL, finish, merged, scalars, start

from longctx_layers.training.checkpoints import read_checkpoint
from longctx_layers.training.hardware import device_count

FLAGS = merged(
    *SMALL, "--trainer.max_steps=3", "--model.window_size=8", "--model.gradient_clip_val=0.1",
    "--data.carry_state=True", "--data.seq_len=32",
)  # fmt: skip

# In float64 the order of the sums is far below what TensorBoard keeps, which is float32. Lightning
# has no --trainer.precision=64-true for FSDP2.
DOUBLE = """
import sys, torch
torch.set_default_dtype(torch.float64)
from longctx_layers.training.cli import main
main()
"""
EPS = torch.finfo(torch.float32).eps


def run(folder, *flags):
    (folder / "double.py").write_text(DOUBLE)
    return finish(start(*merged(*FLAGS, *flags), cwd=folder, program=folder / "double.py"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder, "--data.batch_size=4")
    return folder / "logs"


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(strategy, one_process, tmp_path):
    flags = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    run(tmp_path, *flags)
    for name in ("train_loss", "gradient_norm", "val_loss"):
        expected, got = scalars(one_process, name), scalars(tmp_path / "logs", name)
        assert len(expected) == (1 if name == "val_loss" else 3)
        assert got == pytest.approx(expected, rel=EPS)
    # The same weights, in one file that one process reads.
    states = [
        read_checkpoint(root / "checkpoints/step=00000003.ckpt")[0].state_dict()
        for root in (one_process, tmp_path / "logs")
    ]
    for name, value in states[0].items():
        assert value.dtype == torch.float64
        assert (states[1][name] - value).abs().max() <= EPS * value.abs().max(), name
    # And it goes on from there with two processes.
    assert "step 4  loss" in run(tmp_path, *flags, "--trainer.max_steps=4", "--ckpt_path=last")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(2, 2), ("2", 2), ("auto", 8), (-1, 8), ([0, 3], 2), ("0,3", 2), ("1,", 1)],
)
def test_device_count(devices, expected):
    assert device_count(devices, 8) == expected
