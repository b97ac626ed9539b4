"""Build the layer that continues a pretrained attention, with its projections."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from longctx_layers.convert.families import Site
from longctx_layers.layers import AttentionLayer, Layer, Projection, build_layer
from longctx_layers.layers.parameters import device_of, weight_dtype


def build_like(
    site: Site, config: Any, block_type: str, dropout: float | None, options: dict[str, Any]
) -> AttentionLayer[Any]:
    """Build the layer that computes the same as an attention module, with its projections.

    Raises:
        ValueError: for an attention that no layer can continue, or options that do not fit it.
    """
    family = site.family
    attention = site.attention
    _refuse_unsupported(attention, config)
    projections = family.split(attention)
    rope = family.rope(config)
    head_dim = attention.head_dim
    q, k, _, out = projections
    layer = build_layer(
        block_type,
        config.hidden_size,
        q.out_features // head_dim,
        n_kv_heads=k.out_features // head_dim,
        rope_base=rope.base,
        dropout=_single_dropout(*family.dropout(attention)) if dropout is None else dropout,
        projection=Projection(
            head_dim=head_dim,
            bias=_has_bias(q),
            out_bias=_has_bias(out),
            qk_norm=hasattr(attention, "q_norm"),
            rope_scaling=rope.scaling,
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
    for name, module in projections._asdict().items():
        setattr(layer, name, module)
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(layer, name, getattr(attention, name))  # with its own eps
    for name in ("k_proj", "v_proj"):
        if getattr(layer, f"global_{name}", None) is not None:
            setattr(layer, f"global_{name}", deepcopy(getattr(projections, name)))
    return layer.train(attention.training)


def _has_bias(linear: Any) -> bool:
    bias = getattr(linear, "bias", None)
    return (bias() if callable(bias) else bias) is not None  # torch's quantised ones have a method


def _single_dropout(weights: float, output: float) -> float:
    if weights != output:
        raise ValueError(
            "model: expected the same dropout for attention weights and output, got "
            f"{weights} and {output}; pass dropout=, e.g. 0.0"
        )
    return float(weights)


def _refuse_unsupported(attention: Any, config: Any) -> None:
    features = {
        "cross-attention": getattr(config, "add_cross_attention", False),
        "attention to later tokens": not getattr(config, "is_causal", True),
        "attention sinks": getattr(attention, "sinks", None) is not None,
        "a cap on scores": getattr(config, "attn_logit_softcapping", None),
    }
    unsupported = [name for name, present in features.items() if present]
    if unsupported:
        raise ValueError(
            f"model: expected plain causal self-attention, got {' and '.join(unsupported)}; "
            "convert a model without it, or put the layers in by hand: see docs/integration.md"
        )


def _check_window(layer: Layer[Any], attention: Any, config: Any, index: int) -> None:
    # Mistral has one window for all layers; Qwen's attention modules have their own.
    default = getattr(config, "sliding_window", None)
    window = getattr(attention, "sliding_window", default)
    reach = layer.reach
    if window is not None and (reach is None or reach > window):
        raise ValueError(
            f"window_size: expected at most {window}, the sliding window of the model's layer "
            f"{index}, got {'full attention' if reach is None else reach}; pass a smaller one, or "
            "leave this layer out"
        )
