"""Saving and loading: the same model bit for bit, and a clear word about anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from longctx_layers.layers import LAYERS, Projection, RopeScaling
from longctx_layers.lm import pretrained
from longctx_layers.lm.model import LongContextLM
from longctx_layers.testing import parameter_dtypes, small_model

PATTERNS = [*((name,) for name in LAYERS), ("dpassm", "blade", "vanilla")]
IDS = torch.arange(22).remainder(13).view(2, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_round_trip_is_exact(
    pattern: tuple[str, ...], tie_embeddings: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = small_model(*pattern, tie_embeddings=tie_embeddings, dtype=dtype)
    model.save_pretrained(tmp_path / "a" / "model")
    files = sorted(path.name for path in (tmp_path / "a" / "model").iterdir())
    assert files == ["config.json", "model.safetensors"]  # nothing temporary is left
    loaded = LongContextLM.from_pretrained(tmp_path / "a" / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert parameter_dtypes(loaded)[1] == {dtype}
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value)
    assert_close(loaded(IDS), model.eval()(IDS))  # not equal: see below
    loaded.loss(IDS, IDS).backward()


def test_options_survive(tmp_path: Path) -> None:
    projection = Projection(head_dim=6, bias=True, rope_scaling=RopeScaling(8.0, 64))
    given = {"window": {"window_size": 3, "projection": projection}}
    model = small_model("window", block_kwargs=given, dropout=0.1, norm_eps=1e-6)
    model.save_pretrained(tmp_path)
    loaded = LongContextLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.blocks[0].mixer.projection == projection


def test_dtype_and_device(tmp_path: Path) -> None:
    small_model("dpassm", dtype=torch.float32).save_pretrained(tmp_path)
    loaded = LongContextLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert parameter_dtypes(loaded) == ({torch.float32}, {torch.bfloat16})
    with torch.device("meta"):  # an outer device is no reason to load nothing
        loaded = LongContextLM.from_pretrained(tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_loading_draws_nothing_from_the_generator(tmp_path: Path) -> None:
    small_model("dpassm").save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    LongContextLM.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_saving_over_a_loaded_model_keeps_both(tmp_path: Path) -> None:
    model = small_model("dpassm")
    model.save_pretrained(tmp_path)
    loaded = LongContextLM.from_pretrained(tmp_path)  # may still be mapped from the file
    small_model("dpassm", seed=1).save_pretrained(tmp_path)
    # Not equal: products round as their operands lie in memory.
    assert_close(loaded(IDS), model(IDS))
    assert not torch.allclose(LongContextLM.from_pretrained(tmp_path)(IDS), model(IDS))


def test_interrupted_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("dpassm")
    model.save_pretrained(tmp_path)

    def fail(weights: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        small_model("dpassm", seed=1).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_close(LongContextLM.from_pretrained(tmp_path)(IDS), model(IDS))


def test_failed_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Any, path: Path, **_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="could not write .*No space left"):
        small_model("window").save_pretrained(tmp_path / "new/model")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_options_write_nothing(tmp_path: Path) -> None:
    model = small_model("window")
    model.config.block_kwargs["window"]["window_size"] = torch.tensor(3)
    with pytest.raises(TypeError, match="block_kwargs of numbers, strings, lists and dicts"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- Errors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model("dpassm").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(content | changes))


def test_config_says_what_wrote_it(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    assert content["format"] == "longctx_layers"
    assert content["format_version"] == 1
    assert content["library_version"]


def test_missing_folder_and_files(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder.*save_pretrained"):
        LongContextLM.from_pretrained(saved / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.*has \['config.json'\]"):
        LongContextLM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        LongContextLM.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "\ud800", '{"model_type": "llama"}', "[1]"])
def test_foreign_config(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="config.json: expected"):
        LongContextLM.from_pretrained(saved)


def test_later_format(saved: Path) -> None:
    edit_config(saved, format_version=2, library_version="9.0")
    with pytest.raises(ValueError, match="format version 1, got 2.*longctx_layers 9.0"):
        LongContextLM.from_pretrained(saved)


def test_unknown_and_missing_keys(saved: Path) -> None:
    edit_config(saved, model={"d_modle": 16})
    with pytest.raises(ValueError, match=r"unknown keys \['d_modle'\]; did you mean 'd_model'\?"):
        LongContextLM.from_pretrained(saved)
    path = saved / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["d_modle"], content["model"]["n_heads"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"keys \['n_heads'\] are missing"):
        LongContextLM.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: expected whole safetensors weights"):
        LongContextLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_dim": 32}, r"6 of another shape \(blocks.0.ffn.gate_proj.weight: \[24, 16\]"),
        ({"n_layers": 3}, r"\d+ missing \(blocks.2"),
        ({"n_layers": 1}, r"\d+ not in the model \(blocks.1"),
        ({"tie_embeddings": False}, r"1 missing \(head.weight\)"),
    ],
)
def test_weights_of_another_model(saved: Path, change: dict[str, Any], message: str) -> None:
    edit_config(saved, model=change)
    with pytest.raises(ValueError, match=message):
        LongContextLM.from_pretrained(saved)


def test_changed_weights_are_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the weights have changed since they were saved"):
        LongContextLM.from_pretrained(saved)
    edit_config(saved, weights_crc32=None)  # as models saved before there was one
    LongContextLM.from_pretrained(saved)


def test_weights_are_plain_safetensors(saved: Path) -> None:
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    assert weights.keys() == small_model("dpassm").state_dict().keys()


def test_files_of_two_saves_are_refused(saved: Path) -> None:
    config = (saved / "config.json").read_text()
    LongContextLM.from_pretrained(saved).save_pretrained(saved)
    (saved / "config.json").write_text(config)
    with pytest.raises(ValueError, match="of one save, got .* was interrupted"):
        LongContextLM.from_pretrained(saved)


def test_files_are_as_readable_as_others(saved: Path) -> None:
    (saved / "other").touch()
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_meta_device_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="expected a device that holds weights, got 'meta'"):
        LongContextLM.from_pretrained(saved, device="meta")
