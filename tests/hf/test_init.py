"""Weights are initialised once, and those missing in a checkpoint as in a new model."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_models import every_pattern
from support.pretrained_models import pretrained
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longctx_layers import BLADE, DPASSM, CausalAttention, LongContextLM
from longctx_layers.convert import convert_attention, load_converted
from longctx_layers.hf import LongCtxConfig, LongCtxForCausalLM
from longctx_layers.testing import small_model

WEIGHTS = "model.safetensors"


class Around(PreTrainedModel):
    """A transformers model that contains one of this library."""

    config_class = LongCtxConfig
    base_model_prefix = "lm"

    def __init__(self, config: LongCtxConfig, inner: LongCtxForCausalLM | None = None) -> None:
        super().__init__(config)
        self.lm = LongCtxForCausalLM(config) if inner is None else inner
        self.score = nn.Linear(config.hidden_size, 2)
        self.post_init()


class BareConfig(PreTrainedConfig):
    model_type = "bare"


class Bare(PreTrainedModel):
    """A transformers model that contains these layers and a whole LongContextLM."""

    config_class = BareConfig
    base_model_prefix = "bare"

    def __init__(self, config: BareConfig) -> None:
        super().__init__(config)
        self.first = DPASSM(16, 2, window_size=4, ssm_state_dim=4, fuse="residual")
        self.second = BLADE(16, 2, chunk_size=4, state_dim=4, n_memory_tokens=2)
        self.third = DPASSM(16, 2, window_size=4, ssm_state_dim=4, ssm="diagonal")
        self.fourth = BLADE(16, 2, chunk_size=4, state_dim=4, state_update="mlp")
        self.fifth = CausalAttention(16, 2)
        self.native = LongContextLM(small_model("dpassm", "blade").config)
        self.own = nn.Linear(16, 16)
        self.post_init()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_kept(model: nn.Module, before: dict[str, Tensor]) -> None:
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert changed == []


def drawn_again(model: PreTrainedModel) -> None:
    model.post_init()
    model.init_weights()
    model.initialize_weights()


def without(folder: Path, *names: str) -> None:
    """Remove tensors from a saved model."""
    weights = load_file(folder / WEIGHTS)
    remaining = {name: x for name, x in weights.items() if name not in names}
    save_file(remaining, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def junk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, as it may happen to contain zeros."""
    empty_like = torch.empty_like

    def poisoned(x: Tensor, **options: Any) -> Tensor:
        made = empty_like(x, **options)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", poisoned)


# ---- Initialising twice


@every_pattern
def test_a_native_models_weights_stay(pattern: tuple[str, ...]) -> None:
    native = small_model(*pattern)
    before = values(native)
    model = LongCtxForCausalLM.from_native(native)
    own = values(model)
    drawn_again(model)
    drawn_again(Around(model.config, model))
    assert_kept(model, own)
    assert_kept(native, before)


def test_however_a_model_was_made(tmp_path: Path) -> None:
    native = small_model("dpassm", "blade")
    native.save_pretrained(tmp_path / "native")
    LongCtxForCausalLM.from_native(native).save_pretrained(tmp_path / "ours")
    new = LongCtxForCausalLM(LongCtxConfig.from_model_config(native.config))
    for model in (
        new,
        copy.deepcopy(new),
        LongCtxForCausalLM.from_pretrained(tmp_path / "native"),
        LongCtxForCausalLM.from_pretrained(tmp_path / "ours"),
        LongCtxForCausalLM.from_native(LongContextLM.from_pretrained(tmp_path / "native")),
    ):
        before = values(model)
        drawn_again(model)
        assert_kept(model, before)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_and_head_stay(tied: bool) -> None:
    model = LongCtxForCausalLM.from_native(small_model("dpassm", tie_embeddings=tied))
    model.resize_token_embeddings(20)
    before = values(model)
    drawn_again(model)
    assert_kept(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("block", ["dpassm", "baseline_longformer"])
def test_converted_weights_stay(family: str, block: str) -> None:
    model: Any = convert_attention(pretrained(family), block, window_size=4)
    before = values(model)
    drawn_again(model)
    drawn_again(model.base_model)
    assert_kept(model, before)


def test_bare_layers_keep_their_own_first_values() -> None:
    model = Bare(BareConfig())
    assert not model.first.gate_proj.weight.any()
    assert not model.first.norm_s.weight.any()
    before = values(model)
    drawn_again(model)
    assert_kept(model, before)


# ---- Weights missing in a checkpoint


def assert_drawn(name: str, actual: Tensor, new: Tensor) -> None:
    """Compare a weight with that of a new model; by their spread if there are enough values."""
    assert torch.isfinite(actual).all(), name
    spread = new.std(correction=0)
    if spread == 0:
        torch.testing.assert_close(actual, new, msg=name)
    elif new.numel() >= 16:
        assert 0.4 * spread < actual.std(correction=0) < 2.5 * spread, name
    else:
        assert actual.abs().max() < 30, name


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("pattern", [("dpassm", "blade"), ("baseline_longformer", "vanilla")])
def test_missing_weights_are_drawn_and_no_others(
    pattern: tuple[str, ...], group: int, tmp_path: Path, junk: None
) -> None:
    native = small_model(*pattern, n_layers=len(pattern), tie_embeddings=False)
    torch.manual_seed(0)
    whole = Around(LongCtxConfig.from_model_config(native.config))
    before = values(whole)
    whole.save_pretrained(tmp_path)
    lacking = list(before)[group::4]
    without(tmp_path, *lacking)
    actual = values(Around.from_pretrained(tmp_path))
    for name, x in before.items():
        if name in lacking:
            assert_drawn(name, actual[name], x)
        else:
            assert torch.equal(actual[name], x), name


def test_time_scales_fit_steps_that_were_loaded(tmp_path: Path, junk: None) -> None:
    config = LongCtxConfig.from_model_config(small_model("dpassm").config)
    model = LongCtxForCausalLM(config)
    before = model.model.blocks[0].mixer.state_space.A_log.clone()
    model.save_pretrained(tmp_path)
    without(tmp_path, "model.blocks.0.mixer.state_space.A_log")
    loaded = LongCtxForCausalLM.from_pretrained(tmp_path)
    space = loaded.model.blocks[0].mixer.state_space
    torch.testing.assert_close(space.A_log, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_converted_models_folder_lacks(family: str, tmp_path: Path, junk: None) -> None:
    model: Any = convert_attention(pretrained(family), "dpassm", window_size=4, ssm_state_dim=4)
    before = values(model)
    model.save_pretrained(tmp_path)
    new = [name for name in before if "state_space" in name or "layer.gate_proj" in name]
    new += [name for name in before if "norm_s" in name]
    assert len(new) == 9 * 3
    without(tmp_path, *new)
    loaded = load_converted(tmp_path)
    ids = torch.randint(5, 61, (2, 4))
    # The state-space path contributes nothing at first.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    for name in new:
        assert_drawn(name, loaded.state_dict()[name], before[name])


def test_what_a_folder_of_bare_layers_lacks(tmp_path: Path, junk: None) -> None:
    model = Bare(BareConfig())
    before = values(model)
    model.save_pretrained(tmp_path)
    without(tmp_path, *(name for name in before if not name.startswith("own")))
    actual = values(Bare.from_pretrained(tmp_path))
    for name, x in before.items():
        assert_drawn(name, actual[name], x)


# ---- Classes of converted models


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copied_and_pickled(family: str) -> None:
    model: Any = convert_attention(pretrained(family), "window", window_size=4).eval()
    ids = torch.randint(5, 61, (2, 9))
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(ids).logits, expected)
    assert isinstance(model, type(pretrained(family)))
    assert type(model).__name__ == type(pretrained(family)).__name__
