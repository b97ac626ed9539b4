"""A checkpoint becomes a folder that loads without this program and gives the same logits."""

import runpy
import sys

import pytest
import torch
from program import ROOT, SMALL, fit, merged
from torch.testing import assert_close
from training.tokenization import load_tokenizer

from longctx_layers import LongContextLM


@pytest.fixture
def export(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(ROOT / "examples/export.py"))["main"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_export(export, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli = fit(*merged(*SMALL, f"--data.tokenizer={tokenizer}", "--model.window_size=8"))
    export(["--checkpoint", "logs/checkpoints/step=00000002.ckpt", "--output", "model"])
    assert "loaded from there it gives the checkpoint's logits" in capsys.readouterr().out
    model, text = LongContextLM.from_pretrained("model"), "def f(x): return x"
    ids = load_tokenizer("model").encode(text)
    assert ids == cli.datamodule.tokenizer.encode(text)
    trained = cli.model.model.eval()
    with torch.no_grad():
        assert_close(model(torch.tensor([ids])), trained(torch.tensor([ids])))


def test_errors(export, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    saved = {"tokenizer": {"../outside.json": torch.zeros(1, dtype=torch.uint8)}}
    torch.save({"state_dict": {}, "longctx": saved}, tmp_path / "climbing.ckpt")
    for name, message in (
        ("none.ckpt", "expected a file"),
        ("other.ckpt", "examples/train.py wrote"),
        ("climbing.ckpt", "files without a path"),
    ):
        with pytest.raises(SystemExit):
            export(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "model")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
