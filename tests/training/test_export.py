"""A checkpoint becomes a folder that loads without this program and gives the same logits."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.program import ROOT, SMALL, fit, merged
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import longctx_layers.hf  # noqa: F401  (so that transformers reads our models)
from longctx_layers import LongContextLM
from longctx_layers.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from longctx_layers.evals.program import models
from longctx_layers.lm import pretrained
from longctx_layers.reports.checkpoint import read
from longctx_layers.testing import small_model
from longctx_layers.training import export as export_program
from longctx_layers.training.checkpoints import packed_tokenizer

CHECKPOINT = ("--checkpoint", "logs/checkpoints/step=00000002.ckpt")
# The files of a tokenizer of bytes, as checkpoints of an earlier version hold them.
BYTES = {
    "tokenizer_config.json": torch.frombuffer(
        bytearray(b'{"tokenizer_class": "bytes"}'), dtype=torch.uint8
    )
}


@pytest.fixture
def export():
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
    check_by_transformers("model", cli.datamodule.tokenizer, text)
    trained = cli.model.model.eval()
    with torch.no_grad():
        assert_close(model(torch.tensor([ids])), trained(torch.tensor([ids])))
    # The same again replaces it; the flags have other names, too.
    export(["--checkpoint_path", CHECKPOINT[1], "--output-dir=model"])

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
        ("file/model", "could not write file/model"),
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


def check_by_transformers(folder, tokenizer, text):
    """Its classes read model and tokenizer, and generation stops at the end of text."""
    model, theirs = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    end = tokenizer.end_of_text
    assert end == model.config.eos_token_id == model.generation_config.eos_token_id
    assert theirs.eos_token_id == end
    prompt = theirs(text, return_tensors="pt")
    assert prompt["input_ids"].tolist() == [tokenizer.encode(text)]
    assert theirs.decode(prompt["input_ids"][0]) == text
    weight = model.get_input_embeddings().weight.detach()  # a model that says the end and no more
    weight.zero_()[end] = 1
    weight[prompt["input_ids"][0, -1]] = 0.5
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated[0, prompt["input_ids"].shape[1] :].tolist() == [end]


def test_a_checkpoint_with_a_tokenizer_of_bytes_of_an_earlier_version(export, tmp_path):
    model = small_model("window", vocab_size=257)
    longctx = {"config": model.config.to_dict(), "tokenizer": BYTES}
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "longctx": longctx}, tmp_path / "old.ckpt")
    export(["--checkpoint", str(tmp_path / "old.ckpt"), "--output", str(tmp_path / "model")])
    check_by_transformers(tmp_path / "model", ByteTokenizer(), "text")


def test_a_tokenizer_with_several_chat_templates(export, tmp_path, capsys):
    """Its files are in a folder of their own, from the checkpoint to the export and again."""
    templates = {"default": "{{ messages[0].content }}", "tool_use": "with tools"}
    bpe = train_bpe(["some words"], 265)
    bpe.tokenizer.chat_template = templates
    model = small_model("window", vocab_size=bpe.vocab_size)
    saved = {"config": model.config.to_dict(), "tokenizer": packed_tokenizer(bpe)}
    assert "additional_chat_templates/tool_use.jinja" in saved["tokenizer"]
    content = {"longctx": saved, "LongContextData": {"order": {}}, "global_step": 1}
    content["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    content["hyper_parameters"] = {}
    path = tmp_path / "c.ckpt"
    torch.save(content, path)
    for tokenizer in (read(path).tokenizer, models.load(path).tokenizer):
        assert tokenizer.fingerprint == bpe.fingerprint
    arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "model")]
    for _ in range(2):  # a new folder, and one with an earlier export
        export(arguments)
        assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == templates
    other = tmp_path / "model/additional_chat_templates/other.jinja"
    other.write_text("of another one")
    with pytest.raises(SystemExit):
        export(arguments)
    assert "got additional_chat_templates/other.jinja" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["weights", "tokenizer", "check"])
def test_failed_export_leaves_nothing(fails, export, tmp_path, monkeypatch, capsys):
    """A new folder, with parents that are made for it, and one with an earlier export."""
    model = small_model("window", vocab_size=257)
    saved = {"config": model.config.to_dict(), "tokenizer": BYTES}
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "longctx": saved}, tmp_path / "c.ckpt")
    arguments = ["--checkpoint", str(tmp_path / "c.ckpt"), "--output"]
    export([*arguments, str(tmp_path / "earlier")])
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def part(weights, path, **_):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    target, name, value = {
        "weights": (pretrained, "save_file", part),
        "tokenizer": (Path, "write_bytes", full),
        "check": (
            LongContextLM,
            "from_pretrained",
            lambda folder: small_model("window", vocab_size=257, seed=1),
        ),
    }[fails]
    monkeypatch.setattr(target, name, value)
    for output in ("new/parents/model", "earlier"):
        with pytest.raises(SystemExit):
            export([*arguments, str(tmp_path / output)])
        expected = "logits differ" if fails == "check" else "No space left on device"
        assert expected in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.ckpt", "earlier"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_errors(export, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    climbing = ["../outside.json", "/outside.json", "a/../../outside.json", "c:\\outside.json", ""]
    for number, name in enumerate(climbing):
        saved = {"tokenizer": {name: torch.zeros(1, dtype=torch.uint8)}}
        torch.save({"state_dict": {}, "longctx": saved}, tmp_path / f"climbing{number}.ckpt")
    for name, message in (
        ("none.ckpt", "expected a file"),
        ("other.ckpt", "other.ckpt, which holds state_dict, but no longctx; it is"),
        ("tensor.ckpt", "tensor.ckpt, which holds a Tensor; it is damaged or another program's"),
        ("empty.ckpt", "empty.ckpt, which is empty; it is damaged"),
        ("text.ckpt", "text.ckpt, which is cut short, or is no checkpoint"),
        *((f"climbing{n}.ckpt", "paths inside their folder") for n in range(len(climbing))),
    ):
        with pytest.raises(SystemExit):
            export(["--checkpoint", str(tmp_path / name), "--output", str(tmp_path / "model")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_usage_errors_name_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longctx"])
    with pytest.raises(SystemExit) as error:
        export_program.main(["--checkpont", "a"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("longctx export: error: ")
