"""Trained models from checkpoints and from folders."""

import pytest
import torch
from support.program import SMALL, fit, merged

from longctx_layers import create_model
from longctx_layers.data.tokenizers import ByteTokenizer, load_tokenizer
from longctx_layers.training.checkpoints import load_trained, read_checkpoint
from longctx_layers.training.export import export

STEP = "logs/checkpoints/step=00000001.ckpt"


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def run(request, tmp_path_factory):
    """A folder with a checkpoint of one step, and its export."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ("--model.block=window", "--model.window_size=8", "--trainer.max_steps=1")
        fit(*merged(*SMALL, *flags, f"--data.tokenizer={request.param}"))
        export(folder / STEP, folder / "exported")
    return folder, request.param


def test_checkpoint_and_its_export(run):
    folder, tokenizer = run
    trained = load_trained(folder / STEP)
    exported = load_trained(folder / "exported", device="cpu")
    model, _ = read_checkpoint(folder / STEP)
    for loaded in (trained, exported):
        assert not loaded.model.training
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("a wörd")) == "a wörd"
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value), name
        if tokenizer == "bytes":
            assert loaded.tokenizer_name == "bytes"
        else:
            again = load_tokenizer(loaded.tokenizer_name)
            assert again.fingerprint == loaded.tokenizer.fingerprint
    assert trained.tokenizer.fingerprint == exported.tokenizer.fingerprint
    assert (trained.step, exported.step) == (1, None)
    assert trained.options["window_size"] == 8
    assert trained.order["seq_len"] == 64
    assert (exported.options, exported.order) == ({}, {})


def test_folder_of_a_run_is_an_error_that_names_its_newest_checkpoint(run):
    folder, _ = run
    for place in ("logs", "logs/checkpoints"):
        with pytest.raises(FileNotFoundError, match=r"did you mean .*step=00000001\.ckpt"):
            load_trained(folder / place)
    with pytest.raises(FileNotFoundError, match="from_pretrained: expected the file"):
        load_trained(folder)
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file"):
        load_trained(folder / "none.ckpt")


def test_unfit_folders(tmp_path):
    model = create_model(200, "tiny", "window")
    model.save_pretrained(tmp_path)
    assert load_trained(tmp_path).tokenizer is None
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer with ids below 200, got one with 257 ids"):
        load_trained(tmp_path)
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 parameters, first in norm\.weight"):
        load_trained(tmp_path)
