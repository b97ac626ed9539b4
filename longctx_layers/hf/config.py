"""`LongCtxConfig`: the shape of a model as a transformers config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from longctx_layers.layers import LAYERS, layer_options
from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.pretrained import FORMAT, MODEL_TYPE
from longctx_layers.ops.checks import expect_positive

# There is no longest sequence, but programs that look for one need a number: without it they assume
# 2,048 or so.
NO_LONGEST = 2**31 - 1

FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "pattern",
    "block_kwargs",
    "tie_word_embeddings",
    "dropout",
    "rms_norm_eps",
    "use_cache",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# Fields that ModelConfig has under another name.
ALIASES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# Config fields of other transformers models that are options of a layer here.
LAYER_OPTIONS = {
    "num_key_value_heads": "n_kv_heads",
    "sliding_window": "window_size",
    "rope_theta": "rope_base",
    "attention_dropout": "dropout",
    "head_dim": "projection (its head_dim)",
    "attention_bias": "projection (its bias and out_bias)",
    "rope_scaling": "projection (its rope_scaling)",
    "rope_parameters": "projection (its rope_scaling)",
}


class LongCtxConfig(PreTrainedConfig):
    """Describe a `LongCtxForCausalLM`: its sizes, and the layer of each block.

    Field names and defaults follow transformers. The names of `ModelConfig` are accepted too:
    `d_model`, `n_layers`, `n_heads`, `ffn_dim`, `norm_eps`, `tie_embeddings`.

    >>> from longctx_layers.hf import LongCtxConfig
    >>> config = LongCtxConfig(vocab_size=256, hidden_size=64, num_attention_heads=4,
    ...                        block_type="dpassm", block_kwargs={"window_size": 16})
    >>> config.d_model, config.intermediate_size, config.pattern
    (64, 176, ['dpassm'])

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads of every block.
        intermediate_size: hidden width of the SwiGLU; by default 8/3 of hidden_size, rounded up to
            a multiple of 8.
        pattern: names in `LAYERS`, repeated over the depth. For a single name, pass
            `block_type="blade"` instead.
        block_kwargs: options of the layers by block name, `{"dpassm": {"window_size": 128}}`. If
            the pattern has only one name, the options alone are accepted.
        tie_word_embeddings, dropout, rms_norm_eps: see `ModelConfig`.
        use_cache: whether a model in evaluation mode returns its state.
        max_position_embeddings: the longest sequence that other programs should use, for example
            lm-evaluation-harness, which truncates prompts to it. The model itself has no limit.
        pad_token_id, bos_token_id, eos_token_id: the tokenizer's special tokens.

    Raises:
        ValueError, TypeError: as for `ModelConfig`; also for a misspelt name, or an option of a
            layer outside block_kwargs.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = ALIASES

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        block_type: str | None = None,
        pattern: Sequence[str] | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
        tie_word_embeddings: bool = True,
        dropout: float = 0.0,
        rms_norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        max_position_embeddings: int = NO_LONGEST,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in locals().items() if name in FIELDS}
        for name, value in kwargs.items():
            _expect_known(name, value)
        for alias, name in ALIASES.items():
            if alias in kwargs:
                values[name] = kwargs.pop(alias)
        if block_type is not None and pattern is not None:
            raise ValueError(
                f"LongCtxConfig: expected block_type or pattern, got both, {block_type!r} and "
                f"{pattern!r}; pass only one of them"
            )
        values["pattern"] = pattern or block_type or "dpassm"
        values["block_kwargs"] = block_kwargs or {}
        expect_positive("max_position_embeddings", max_position_embeddings)
        if values["intermediate_size"] is None:
            values["intermediate_size"] = _round_up_to_8(values["hidden_size"] * 8 / 3)
        super().__init__(**kwargs)
        for name, value in values.items():
            setattr(self, name, value)
        # In the form that JSON returns: lists, and a layer's Projection as a dict.
        plain = self.to_model_config().to_dict()
        self.pattern = plain["pattern"]
        self.block_kwargs = plain["block_kwargs"]

    def to_model_config(self) -> ModelConfig:
        """Return the same shape as a `ModelConfig`, to build a `LongContextLM`."""
        return ModelConfig(
            **{field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        )

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> LongCtxConfig:
        """Convert the config of a `LongContextLM`; `others` are further fields of this class."""
        return cls(**config.to_dict(), **others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from a dict of transformers or of `LongContextLM.save_pretrained`."""
        if config_dict.get("format") == FORMAT:
            shape = ModelConfig.from_dict(config_dict["model"])
            token_ids = {n: v for n, v in config_dict.items() if n in FIELDS and n.endswith("_id")}
            config_dict = cls.from_model_config(shape, **token_ids).to_dict()
        return super().from_dict(config_dict, **kwargs)


def _round_up_to_8(width: float) -> int:
    return math.ceil(width / 8) * 8


def _expect_known(name: str, value: Any) -> None:
    """Raise ValueError for a name that is probably a mistake.

    It cannot be raised for every unknown name, because transformers stores any as an attribute.
    """
    if name in LAYER_OPTIONS:
        raise ValueError(
            f"LongCtxConfig: {name} is an option of the layers here; pass {LAYER_OPTIONS[name]} in "
            "block_kwargs"
        )
    options = {option for block in LAYERS for option in layer_options(block)}
    if name in options - {"dtype", "device"}:
        raise ValueError(
            f"LongCtxConfig: {name} is an option of the layers; pass "
            f"block_kwargs={{{name!r}: {value!r}}}"
        )
    if name not in ALIASES and (close := get_close_matches(name, [*FIELDS, *ALIASES], 1, 0.85)):
        raise ValueError(f"LongCtxConfig: unknown field {name!r}; did you mean {close[0]!r}?")
