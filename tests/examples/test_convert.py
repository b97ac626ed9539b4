"""examples/convert.py: the recipe measures what it says, and each of its steps helps."""

import runpy
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs the extra `hf`")
from longctx_layers.convert import convert_attention

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def recipe():
    return runpy.run_path(str(FOLDER / "convert.py"))


@pytest.fixture
def text(tmp_path):
    """Documents that say at their beginning what comes back all through them."""
    for n in range(24):
        line = f"{n * 7919 % 1000:03d} and some more words. "
        (tmp_path / f"{n}.txt").write_text(line * 20)
    return tmp_path


def test_small_run(recipe, text, tmp_path):
    out = tmp_path / "out"
    command = (
        f"--text {text} --output_dir {out} --steps 40 --matching-steps 15 --tuning-steps 25 "
        "--window-size 6 --sequence-length 64 --batch-size 4 --width 32 --layers 2 "
        "--validation-documents 3"
    )
    losses = recipe["main"](command.split())
    kinds = [f"{kind}, {step}" for kind in recipe["KINDS"] for step in recipe["STEPS"]]
    assert list(losses) == ["original", *kinds, "original, trained on"]
    within, beyond = slice(0, 6), slice(6, 64)
    mean = {row: values[:, beyond].mean() for row, values in losses.items()}
    for kind in recipe["KINDS"]:
        converted, matched, trained = (f"{kind}, {step}" for step in recipe["STEPS"])
        assert_close(losses[converted][:, within], losses["original"][:, within])
        assert mean["original"] < mean[converted]
        assert mean[trained] < mean[converted]
    report = (out / "report.md").read_text()
    for row, values in losses.items():
        assert f"| {row} |" in report
        assert f"| {values[:, beyond].mean():.3f} |" in report
    assert f"`python examples/convert.py {command}`" in report


def test_matching_is_exact_within_the_window_and_learns(recipe):
    args = recipe["parse"](["--width", "32", "--layers", "2"])
    teacher = recipe["small_llama"](args)
    student = convert_attention(deepcopy(teacher), window_size=8, ssm_state_dim=4)
    ids = torch.randint(0, 256, (2, 41))
    assert recipe["matching_loss"](teacher, student, ids[:, :9]) < 1e-9
    first = recipe["matching_loss"](teacher, student, ids)
    assert first > 1e-3
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(10):
        loss = recipe["matching_loss"](teacher, student, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert recipe["matching_loss"](teacher, student, ids) < first
    assert teacher.model.layers[0].self_attn.q_proj.weight.grad is None


def test_errors(recipe, capsys):
    for flags, message in (
        (["--width", "20"], "--width: expected a multiple of 16, got 20"),
        (["--window-size", "512"], "--window_size: expected less than --sequence_length 512"),
    ):
        with pytest.raises(SystemExit):
            recipe["main"](flags)
        assert message in capsys.readouterr().err
