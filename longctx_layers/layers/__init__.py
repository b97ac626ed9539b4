"""The layers, and their registry: tests, benchmarks, training and evaluation all iterate it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from longctx_layers.layers.base import AttentionLayer, KeyValueState, Projection
from longctx_layers.layers.bigbird import BigBird
from longctx_layers.layers.blade import BLADE, BLADEState
from longctx_layers.layers.causal import CausalAttention
from longctx_layers.layers.dpassm import DPASSM, DPASSMState
from longctx_layers.layers.longformer import Longformer, LongformerState
from longctx_layers.layers.rotary import RopeScaling
from longctx_layers.layers.state import detach_state, map_state, select_rows, state_to

LAYERS: dict[str, Callable[..., AttentionLayer]] = {
    "vanilla": CausalAttention,
    "window": partial(Longformer, n_global_tokens=0),
    "dpassm": DPASSM,
    "blade": BLADE,
    "baseline_longformer": Longformer,
    "baseline_bigbird": BigBird,
}

# States are plain tensors in NamedTuples: torch.load(..., weights_only=True) may build them.
torch.serialization.add_safe_globals([KeyValueState, LongformerState, DPASSMState, BLADEState])


def layer_options(name: str) -> list[str]:
    """The options that `build_layer` accepts for a layer of the registry."""
    layer = _registered(name)
    fixed = layer.keywords if isinstance(layer, partial) else {}
    parameters = inspect.signature(layer).parameters
    return [p for p in parameters if p not in ("d_model", "n_heads") and p not in fixed]


def build_layer(name: str, d_model: int, n_heads: int, **options: Any) -> AttentionLayer:
    """Build a layer by its name in `LAYERS`.

    Args:
        name: `vanilla`, `window`, `dpassm`, `blade`, `baseline_longformer`, `baseline_bigbird`.
        d_model: width of the input and output.
        n_heads: query heads.
        options: of that layer; see its class.

    Raises:
        ValueError: for an unknown name or option (the valid ones are listed), or a wrong value.
    """
    valid = layer_options(name)
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise ValueError(
            f"{name}: expected options out of {valid}, got {unknown}; check the spelling"
        )
    return _registered(name)(d_model, n_heads, **options)


def _registered(name: str) -> Callable[..., AttentionLayer]:
    if name not in LAYERS:
        raise ValueError(f"layer: expected one of {list(LAYERS)}, got {name!r}; choose one of them")
    return LAYERS[name]


__all__ = [
    "LAYERS",
    "AttentionLayer",
    "BLADE",
    "BigBird",
    "CausalAttention",
    "DPASSM",
    "Longformer",
    "Projection",
    "RopeScaling",
    "build_layer",
    "detach_state",
    "layer_options",
    "map_state",
    "select_rows",
    "state_to",
]
