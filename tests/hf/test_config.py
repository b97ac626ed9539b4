"""LongCtxConfig: both sets of field names, the round trip through JSON, and errors."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from longctx_layers import ModelConfig, Projection
from longctx_layers.hf import LongCtxConfig
from longctx_layers.testing import small_model


def test_names_of_transformers_and_ours_are_the_same_fields() -> None:
    ours = LongCtxConfig(vocab_size=100, d_model=64, n_layers=3, n_heads=2, ffn_dim=96)
    theirs = LongCtxConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
    )
    assert ours.to_dict() == theirs.to_dict()
    assert (ours.hidden_size, ours.num_hidden_layers, ours.num_attention_heads) == (64, 3, 2)
    assert LongCtxConfig(rms_norm_eps=1e-6, tie_embeddings=False).to_model_config() == (
        LongCtxConfig(norm_eps=1e-6, tie_word_embeddings=False).to_model_config()
    )


def test_defaults_make_a_model_of_a_usual_shape() -> None:
    config = LongCtxConfig()
    assert config.to_model_config() == ModelConfig(
        vocab_size=32000, d_model=768, n_layers=12, n_heads=12, ffn_dim=2048
    )
    assert (
        LongCtxConfig(hidden_size=100, num_attention_heads=2).ffn_dim == 272
    )  # 8/3, rounded up to a multiple of 8


def test_block_type_is_a_pattern_of_one() -> None:
    config = LongCtxConfig(block_type="blade", block_kwargs={"chunk_size": 32})
    assert config.pattern == ["blade"]
    assert config.block_kwargs == {"blade": {"chunk_size": 32}}
    assert LongCtxConfig(pattern="blade").pattern == ["blade"]
    assert LongCtxConfig(pattern=("dpassm", "vanilla")).pattern == ["dpassm", "vanilla"]


def test_json_there_and_back(tmp_path: Path) -> None:
    config = LongCtxConfig(
        pattern=("dpassm", "vanilla"),
        block_kwargs={
            "dpassm": {"window_size": 7},
            "vanilla": {"projection": Projection(head_dim=6, bias=True)},
        },
        eos_token_id=[3, 4],
        dropout=0,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "longctx"
    # Fields that other programs read.
    assert written["num_attention_heads"] == written["num_hidden_layers"] == 12
    assert written["hidden_size"] == 768
    for read in (LongCtxConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(read, LongCtxConfig)
        assert read.to_model_config() == config.to_model_config()
        assert read.eos_token_id == [3, 4]
    options = config.to_model_config().layer_options(1)
    assert options["projection"] == Projection(head_dim=6, bias=True)


def test_config_of_our_own_folder(tmp_path: Path) -> None:
    model = small_model("dpassm", "blade", tie_embeddings=False)
    model.save_pretrained(tmp_path)
    config = LongCtxConfig.from_pretrained(tmp_path)
    assert config.to_model_config() == model.config
    assert config.tie_word_embeddings is False


def test_from_model_config_takes_the_rest_as_given() -> None:
    shape = small_model("blade").config
    config = LongCtxConfig.from_model_config(shape, eos_token_id=3, use_cache=False)
    assert config.to_model_config() == shape
    assert (config.eos_token_id, config.use_cache) == (3, False)


def test_the_longest_sequence_is_what_is_asked_for(tmp_path: Path) -> None:
    assert LongCtxConfig().max_position_embeddings == 2**31 - 1
    LongCtxConfig(max_position_embeddings=8192).save_pretrained(tmp_path)
    assert LongCtxConfig.from_pretrained(tmp_path).max_position_embeddings == 8192
    with pytest.raises(ValueError, match="max_position_embeddings: expected"):
        LongCtxConfig(max_position_embeddings=0)


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"window_size is an option .* pass block_kwargs={'window_size': 64}"
    ):
        LongCtxConfig(window_size=64)
    for name, right in (("n_layer", "n_layers"), ("hiden_size", "hidden_size")):
        with pytest.raises(ValueError, match=f"unknown field '{name}'; did you mean '{right}'"):
            LongCtxConfig(**{name: 8})
    with pytest.raises(ValueError, match="expected block_type or pattern, got both"):
        LongCtxConfig(block_type="blade", pattern=["dpassm"])
    with pytest.raises(ValueError, match="unknown layer .*the layers are"):
        LongCtxConfig(block_type="mamba")
    with pytest.raises(ValueError, match="n_layers: expected at least 1"):
        LongCtxConfig(num_hidden_layers=0)
    with pytest.raises(ValueError, match="block_kwargs: expected a dict of options for each"):
        LongCtxConfig(pattern=["dpassm", "vanilla"], block_kwargs={"window_size": 3})
    for name, right in (("num_key_value_heads", "n_kv_heads"), ("rope_scaling", "projection")):
        with pytest.raises(
            ValueError, match=f"{name} is an option of the layers here; pass {right}"
        ):
            LongCtxConfig(**{name: 8})
    with pytest.raises(ValueError, match=r"rope_scaling: unknown keys \['type'\]"):
        LongCtxConfig(block_kwargs={"projection": {"rope_scaling": {"type": "linear"}}})
