"""A checkpoint becomes a folder that loads without this program and gives the same logits."""

import runpy
import sys

import pytest
import torch
from program import ROOT, SMALL, fit, merged
from torch.testing import assert_close
from training.tokenization import load_tokenizer

from longctx_layers import LongContextLM
from longctx_layers.testing import small_model

CHECKPOINT = ("--checkpoint", "logs/checkpoints/step=00000002.ckpt")


@pytest.fixture
def export(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(ROOT / "examples/export.py"))["main"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_export(export, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli = fit(*merged(*SMALL, f"--data.tokenizer={tokenizer}", "--model.window_size=8"))
    export([*CHECKPOINT, "--output", "model"])
    assert "loaded from there it gives the checkpoint's logits" in capsys.readouterr().out
    model, text = LongContextLM.from_pretrained("model"), "def f(x): return x"
    ids = load_tokenizer("model").encode(text)
    assert ids == cli.datamodule.tokenizer.encode(text)
    trained = cli.model.model.eval()
    with torch.no_grad():
        assert_close(model(torch.tensor([ids])), trained(torch.tensor([ids])))
    export([*CHECKPOINT, "--output", "model"])  # the same again replaces it

    # A place that holds anything else stays as it is.
    small_model("window").save_pretrained("other")
    (tmp_path / "stale").mkdir()
    for path in (tmp_path / "file", tmp_path / "stale/merges.txt"):
        path.write_text("of another one")
    before = contents(tmp_path)
    for output, message in (
        ("other", "which holds another model; remove that folder"),
        ("stale", "another tokenizer's files, got merges.txt"),
        ("file", "got the file file"),
        ("file/model", "Not a directory"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            export([*CHECKPOINT, "--output", output])
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before

    content = torch.load(CHECKPOINT[1], weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, "less.ckpt")
    with pytest.raises(SystemExit):
        export(["--checkpoint", "less.ckpt", "--output", "less"])
    assert "weights and configuration do not fit" in capsys.readouterr().err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_errors(export, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    saved = {"tokenizer": {"../outside.json": torch.zeros(1, dtype=torch.uint8)}}
    torch.save({"state_dict": {}, "longctx": saved}, tmp_path / "climbing.ckpt")
    for name, message in (
        ("none.ckpt", "expected a file"),
        ("other.ckpt", "other.ckpt, which holds state_dict, and nothing of longctx; it is"),
        ("tensor.ckpt", "tensor.ckpt, which holds a Tensor; it is damaged or another program's"),
        ("empty.ckpt", "empty.ckpt, which is empty; it is damaged"),
        ("text.ckpt", "text.ckpt, which is cut short, or holds something other than tensors"),
        ("climbing.ckpt", "files without a path"),
    ):
        with pytest.raises(SystemExit):
            export(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "model")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
