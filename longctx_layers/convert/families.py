"""What the attention of the supported models looks like, and the layer that continues it."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longctx_layers.layers import AttentionLayer, Layer, Projection, RopeScaling, build_layer
from longctx_layers.layers.parameters import device_of, weight_dtype
from longctx_layers.layers.plain_modules import has_hooks

# Decoders by class name, with the names of their list of layers and of a layer's attention.
DECODERS = {
    "LlamaModel": ("layers", "self_attn"),
    "MistralModel": ("layers", "self_attn"),
    "Qwen2Model": ("layers", "self_attn"),
    "Qwen3Model": ("layers", "self_attn"),
    "GPT2Model": ("h", "attn"),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Site(NamedTuple):
    """Where a decoder keeps the attention of one layer."""

    parent: nn.Module
    name: str
    layer_idx: int

    @property
    def attention(self) -> Any:
        """The attention module."""
        return getattr(self.parent, self.name)


def find_decoder(model: nn.Module) -> Any:
    """The decoder inside a model of transformers.

    Raises:
        ValueError: if there is none of the supported ones, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    found = [module for module in model.modules() if _family(module)]
    if len(found) != 1:
        config = getattr(model, "config", None)
        raise ValueError(
            f"model: expected one decoder out of {list(DECODERS)}, found {len(found)} in a "
            f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}); other "
            "models take the layers by hand: see docs/integration.md"
        )
    return found[0]


def attention_sites(decoder: Any) -> list[Site]:
    """The places of all layers' attention, in order."""
    blocks, name = DECODERS[_family(decoder)]
    return [Site(block, name, i) for i, block in enumerate(getattr(decoder, blocks))]


def _family(module: nn.Module) -> str:
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in DECODERS), "")


def build_like(
    site: Site, config: Any, block_type: str, dropout: float | None, options: dict[str, Any]
) -> AttentionLayer[Any]:
    """The layer that computes what the attention of a place does, with its projections.

    Raises:
        ValueError: for what a layer of ours cannot continue, or options that do not fit.
    """
    attention = site.attention
    _refuse_unsupported(attention, config)
    fused = hasattr(attention, "c_attn")
    for name in ("c_attn", "c_proj") if fused else ():
        module = getattr(attention, name)
        if type(module) is not Conv1D or has_hooks(module):
            found = type(module).__name__ + (" with hooks" if has_hooks(module) else "")
            raise ValueError(
                f"{name}: expected the model's own Conv1D, got a {found}; it is taken apart: merge "
                "adapters first (merge_and_unload) and remove hooks, or add both after converting"
            )
    parts = _split(attention) if fused else {name: getattr(attention, name) for name in PROJECTIONS}
    q, k, out, head_dim = parts["q_proj"], parts["k_proj"], parts["o_proj"], attention.head_dim
    layer = build_layer(
        block_type,
        config.hidden_size,
        q.out_features // head_dim,
        n_kv_heads=k.out_features // head_dim,
        rope_base=None if fused else float(config.rope_parameters["rope_theta"]),
        dropout=_dropout(attention, config) if dropout is None else dropout,
        projection=Projection(
            head_dim=head_dim,
            bias=_has_bias(q),
            out_bias=_has_bias(out),
            qk_norm=hasattr(attention, "q_norm"),
            rope_scaling=None if fused else _rope_scaling(config.rope_parameters),
        ),
        device=device_of(out, attention),
        dtype=weight_dtype(out) or getattr(config, "dtype", None),
        **options,
    )
    if not isinstance(layer, AttentionLayer):
        raise ValueError(
            f"block_type: expected an attention layer, got {block_type!r}, a "
            f"{type(layer).__name__}: it cannot take over the projections of the model's attention"
        )
    _check_window(layer, attention, config, site.layer_idx)
    for name, module in parts.items():
        setattr(layer, name, module)
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(layer, name, getattr(attention, name))  # with its own eps
    for name in ("k_proj", "v_proj"):
        if getattr(layer, f"global_{name}", None) is not None:
            setattr(layer, f"global_{name}", deepcopy(parts[name]))
    return layer.train(attention.training)


def _has_bias(linear: Any) -> bool:
    bias = getattr(linear, "bias", None)
    return (bias() if callable(bias) else bias) is not None  # torch's quantised ones have a method


def _split(attention: Any) -> dict[str, nn.Module]:
    """GPT-2's projections, `[inputs, outputs]` and three in one, as linear layers."""
    weights, biases = attention.c_attn.weight, attention.c_attn.bias
    size = weights.shape[0]
    # Our scores are always divided by sqrt(head_dim): what differs goes into q.
    factor = attention.scaling * math.sqrt(attention.head_dim)
    factors = (1.0 if math.isclose(factor, 1.0) else factor, 1.0, 1.0)
    parts: dict[str, nn.Module] = {
        name: _linear(weight, bias, factor)
        for name, weight, bias, factor in zip(
            PROJECTIONS, weights.split(size, 1), biases.split(size), factors, strict=False
        )
    }
    parts["o_proj"] = _linear(attention.c_proj.weight, attention.c_proj.bias, 1.0)
    return parts


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor, factor: float) -> nn.Linear:
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter((factor * weight.T).contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter((factor * bias).clone(), bias.requires_grad)
    return linear


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            rope["factor"],
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
    raise ValueError(
        f"model: expected rotary embedding of type 'default', 'linear' or 'llama3', got "
        f"{kind or rope!r}; convert the model from before its context was extended so"
    )


def _dropout(attention: Any, config: Any) -> float:
    if hasattr(attention, "attn_dropout"):
        weights, output = attention.attn_dropout.p, attention.resid_dropout.p
    else:
        weights, output = attention.attention_dropout, 0.0
    if weights != output:
        raise ValueError(
            "model: expected one dropout for attention weights and output, got "
            f"{weights} and {output}; pass dropout=, e.g. 0.0"
        )
    return float(weights)


def _refuse_unsupported(attention: Any, config: Any) -> None:
    refused = {
        "cross-attention": getattr(config, "add_cross_attention", False),
        "attention to later tokens": not getattr(config, "is_causal", True),
        "attention sinks": getattr(attention, "sinks", None) is not None,
        "a cap on scores": getattr(config, "attn_logit_softcapping", None),
    }
    found = [name for name, there in refused.items() if there]
    if found:
        raise ValueError(
            f"model: expected plain causal self-attention, got {' and '.join(found)}; convert a "
            "model without, or put the layers in by hand: see docs/integration.md"
        )


def _check_window(layer: Layer[Any], attention: Any, config: Any, index: int) -> None:
    # Mistral has one window for all layers; Qwen's attention knows its own.
    default = getattr(config, "sliding_window", None)
    own = getattr(attention, "sliding_window", default)
    reach = layer.reach
    if own is not None and (reach is None or reach > own):
        raise ValueError(
            f"window_size: expected at most {own}, the sliding window of the model's layer "
            f"{index}, got {'full attention' if reach is None else reach}; make it smaller, or "
            "leave the layer out"
        )
