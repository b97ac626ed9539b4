"""The layers, and their registry: tests, benchmarks, training and evaluation all iterate it."""

from longctx_layers.layers.attention import AttentionLayer, KeyValueState, Projection
from longctx_layers.layers.base import Layer
from longctx_layers.layers.bigbird import BigBird
from longctx_layers.layers.blade import BLADE, BLADEState
from longctx_layers.layers.causal import CausalAttention
from longctx_layers.layers.description import Probe
from longctx_layers.layers.dpassm import DPASSM, DPASSMState
from longctx_layers.layers.longformer import Longformer
from longctx_layers.layers.registry import (
    LAYERS,
    build_layer,
    layer_name,
    layer_options,
    register_layer,
)
from longctx_layers.layers.rotary import RopeScaling
from longctx_layers.layers.state import Field, detach_state, map_state, select_rows, state_to
from longctx_layers.layers.window import LongformerState, WindowAttention

__all__ = [
    "LAYERS",
    "AttentionLayer",
    "BLADE",
    "BLADEState",
    "BigBird",
    "CausalAttention",
    "DPASSM",
    "DPASSMState",
    "Field",
    "KeyValueState",
    "Layer",
    "Longformer",
    "LongformerState",
    "Probe",
    "Projection",
    "RopeScaling",
    "WindowAttention",
    "build_layer",
    "detach_state",
    "layer_name",
    "layer_options",
    "map_state",
    "register_layer",
    "select_rows",
    "state_to",
]
