"""transformers' Trainer applies no weight decay to the parameters that the layers declare."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
from peft import LoraConfig, get_peft_model
from support.hf_models import every_pattern, hf_model
from support.pretrained_models import pretrained
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from longctx_layers import DPASSM, parameter_groups
from longctx_layers.convert import convert_attention
from longctx_layers.testing import small_layer


@pytest.fixture
def decayed(tmp_path: Path) -> Callable[[nn.Module], set[str]]:
    """Names of the parameters that the Trainer decays."""

    def names(model: nn.Module) -> set[str]:
        settings = {"use_cpu": True, "report_to": [], "weight_decay": 0.1}
        trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **settings))
        groups = trainer.create_optimizer().param_groups
        found = {id(p): name for name, p in model.named_parameters()}
        return {found[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    return names


def by_the_library(model: nn.Module) -> set[str]:
    found = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1)
    return {found[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


@every_pattern
def test_our_models(pattern: tuple[str, ...], decayed: Any) -> None:
    model = hf_model(*pattern)
    assert decayed(model) == by_the_library(model)
    assert model.no_weight_decay() & decayed(model) == set()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("block", ["dpassm", "blade"])
def test_converted_models(family: str, block: str, decayed: Any) -> None:
    original = decayed(pretrained(family))
    model = convert_attention(pretrained(family), block)
    assert decayed(model) == by_the_library(model)
    kept = {name for name in original if "attn" not in name}
    assert kept <= decayed(model)  # transformers still decays everything else
    parts = {name.split("layer.", 1)[1] for name in decayed(model) if "attn.layer." in name}
    assert parts == {
        *(f"{p}_proj.weight" for p in "qkvo"),
        *(f"state_space.{part}" for part in ("in_proj.weight", "dt_proj.weight", "conv")),
    }


class Own(PreTrainedModel):
    """A user's model that contains layers of this library."""

    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(11, 16)
        self.block = nn.ModuleDict({"diagonal": small_layer("dpassm-diagonal")})
        self.block["memory"] = small_layer("blade-memory")
        self.post_init()


def test_a_model_of_ones_own(decayed: Any) -> None:
    model = Own(PretrainedConfig())
    assert decayed(model) == by_the_library(model)
    assert {n.rsplit(".", 1)[-1] for n in decayed(model)} == {"weight", "conv"}


def test_adapters(decayed: Any) -> None:
    trained = [f"layer.{part}" for part in ("state_space", "gate_proj", "norm_s")]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=trained)
    model = get_peft_model(convert_attention(pretrained("llama"), "dpassm"), config)
    assert decayed(model) == by_the_library(model)
    parts = {name.split("layer.", 1)[1] for name in decayed(model)}
    saved = "modules_to_save.default"
    assert parts == {
        *(f"q_proj.lora_{x}.default.weight" for x in "AB"),
        *(f"state_space.{saved}.{p}" for p in ("in_proj.weight", "dt_proj.weight", "conv")),
    }


def test_trainer_imported_before_the_first_layer(monkeypatch: Any) -> None:
    utils = importlib.import_module("transformers.trainer_pt_utils")
    model = small_layer("dpassm-diagonal")
    original = utils.get_parameter_names.__wrapped__

    def unmentioned() -> set[str]:
        listed = transformers.trainer.get_parameter_names(model, [nn.LayerNorm], ["bias"])
        return {name for name, _ in model.named_parameters()} - set(listed)

    monkeypatch.setattr(utils, "get_parameter_names", original)
    monkeypatch.setattr(transformers.trainer, "get_parameter_names", original)
    assert unmentioned() == {"gate_proj.bias"}  # transformers alone
    DPASSM(16, 4)
    expected = {"gate_proj.bias", "gate_proj.weight", "norm_s.weight", "norm_o.weight"}
    assert unmentioned() == expected | {"state_space.log_rate"}


def test_says_when_the_trainer_cannot_be_told(monkeypatch: Any) -> None:
    utils = importlib.import_module("transformers.trainer_pt_utils")
    monkeypatch.delattr(utils, "get_parameter_names")
    with pytest.warns(UserWarning, match=r"this version lacks.*parameter_groups"):
        DPASSM(16, 4)
