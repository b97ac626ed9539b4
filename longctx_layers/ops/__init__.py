"""Pure functions over tensors: one name, one piece of mathematics, several backends."""

from longctx_layers.ops.attention import sparse_attention
from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.backends import BACKENDS, Choice, explain, use_backend
from longctx_layers.ops.conv_silu import conv_silu
from longctx_layers.ops.gated_norms import gated_norms
from longctx_layers.ops.segments import Segments
from longctx_layers.ops.state_space.block_ssd import block_ssd
from longctx_layers.ops.state_space.diagonal import diagonal_scan
from longctx_layers.ops.state_space.ssd import ssd

__all__ = [
    "BACKENDS",
    "Choice",
    "FarKeys",
    "Segments",
    "block_ssd",
    "conv_silu",
    "diagonal_scan",
    "explain",
    "gated_norms",
    "sparse_attention",
    "ssd",
    "use_backend",
]
