"""Drop-in causal attention layers for long sequences, with explicit state that streams exactly.

from longctx_layers import DPASSM
layer = DPASSM(d_model=256, n_heads=4, window_size=128)
y, state = layer(x)                   # x, y: [batch, length, 256]
y2, state = layer(more, state)        # goes on where the first call stopped
"""

import sys as _sys
from importlib.metadata import version as _version

from longctx_layers import ops
from longctx_layers._moved import MovedFinder as _MovedFinder
from longctx_layers.layers import (
    BLADE,
    DPASSM,
    LAYERS,
    BigBird,
    CausalAttention,
    Layer,
    Longformer,
    Projection,
    RopeScaling,
    WindowAttention,
    build_layer,
    detach_state,
    register_layer,
    select_rows,
    state_to,
)
from longctx_layers.layers.weight_decay import no_weight_decay, parameter_groups
from longctx_layers.lm.config import ModelConfig
from longctx_layers.lm.factory import create_model
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops import explain, register_backend, use_backend
from longctx_layers.self_check import selfcheck

__version__ = _version("longctx-layers")
_sys.meta_path.append(_MovedFinder())

__all__ = [
    "DPASSM",
    "BLADE",
    "Longformer",
    "BigBird",
    "CausalAttention",
    "WindowAttention",
    "Layer",
    "LAYERS",
    "build_layer",
    "register_layer",
    "Projection",
    "RopeScaling",
    "detach_state",
    "select_rows",
    "state_to",
    "create_model",
    "parameter_groups",
    "no_weight_decay",
    "ModelConfig",
    "LongContextLM",
    "ops",
    "explain",
    "register_backend",
    "selfcheck",
    "use_backend",
    "__version__",
]
