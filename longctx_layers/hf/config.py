"""The model's shape as a config of transformers."""

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

# There is no longest sequence, but programs that look for one want a number, and take it for 2,048
# or so where they find none.
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

# What ModelConfig has under another name.
ALIASES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# What other models of transformers have in their configs, and our layers among their options.
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
    """The shape of a `LongCtxForCausalLM`.

    Names and defaults are those that transformers' models have; our own names do as well:
    `d_model`, `n_layers`, `n_heads`, `ffn_dim`, `norm_eps`, `tie_embeddings`.

    Attributes:
        vocab_size: number of token ids.
        hidden_size, num_hidden_layers, num_attention_heads: width, blocks, query heads.
        intermediate_size: hidden width of the SwiGLU; by default 8/3 of the width, rounded up to a
            multiple of 8.
        pattern: names of `LAYERS`, cycled over depth; `block_type="blade"` is short for one name.
        block_kwargs: options of the layers by block name, `{"dpassm": {"window_size": 128}}`, or
            alone where the pattern has one name.
        tie_word_embeddings, dropout, rms_norm_eps: see `ModelConfig`.
        use_cache: whether a model in evaluation mode returns its state.
        max_position_embeddings: the longest sequence that other programs shall ask for, as
            lm-evaluation-harness, which cuts prompts to it. The model itself has no such limit.
        pad_token_id, bos_token_id, eos_token_id: of the tokenizer.

    Raises:
        ValueError, TypeError: as `ModelConfig`; for a misspelt name, or a layer's option outside
            block_kwargs.
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
        given = {name: value for name, value in locals().items() if name in FIELDS}
        for name, value in kwargs.items():
            _expect_known(name, value)
        given |= {theirs: kwargs.pop(own) for own, theirs in ALIASES.items() if own in kwargs}
        if block_type is not None and pattern is not None:
            raise ValueError(
                f"LongCtxConfig: expected block_type or pattern, got both, {block_type!r} and "
                f"{pattern!r}; leave one out"
            )
        given["pattern"] = pattern or block_type or "dpassm"
        given["block_kwargs"] = block_kwargs or {}
        expect_positive("max_position_embeddings", max_position_embeddings)
        if given["intermediate_size"] is None:
            given["intermediate_size"] = _eights(given["hidden_size"] * 8 / 3)
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)
        # As JSON has it: lists, and a layer's Projection as a dict.
        plain = self.to_model_config().to_dict()
        self.pattern, self.block_kwargs = plain["pattern"], plain["block_kwargs"]

    def to_model_config(self) -> ModelConfig:
        """The same shape as `LongContextLM` takes it."""
        return ModelConfig(
            **{field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        )

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> LongCtxConfig:
        """The config of a `LongContextLM`, with other fields of this one as they are given."""
        return cls(**config.to_dict(), **others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it; also of what `LongContextLM.save_pretrained` wrote."""
        if config_dict.get("format") == FORMAT:
            known = ModelConfig.from_dict(config_dict["model"])
            special = {n: v for n, v in config_dict.items() if n in FIELDS and n.endswith("_id")}
            config_dict = cls.from_model_config(known, **special).to_dict()
        return super().from_dict(config_dict, **kwargs)


def _eights(width: float) -> int:
    return math.ceil(width / 8) * 8


def _expect_known(name: str, value: Any) -> None:
    """Raise for what is most likely a mistake: transformers takes any name for an attribute."""
    if name in LAYER_OPTIONS:
        raise ValueError(
            f"LongCtxConfig: expected the layers' options in block_kwargs, got {name}; pass "
            f"{LAYER_OPTIONS[name]} there"
        )
    options = {option for block in LAYERS for option in layer_options(block)}
    if name in options - {"dtype", "device"}:
        raise ValueError(
            f"LongCtxConfig: expected the layers' options in block_kwargs, got {name} beside it; "
            f"pass block_kwargs={{{name!r}: {value!r}}}"
        )
    if name not in ALIASES and (close := get_close_matches(name, [*FIELDS, *ALIASES], 1, 0.85)):
        raise ValueError(f"LongCtxConfig: expected a known name, got {name}; write {close[0]}")
