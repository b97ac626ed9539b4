"""Pure functions over tensors: one name is one piece of mathematics, with several backends.

Shapes in all of them: B batch, T tokens of the call, S keys (cached ones first), H heads, G key
heads (a divisor of H), P head_dim, N state; L lists of F far keys; C channels, W width of a
convolution. The matrices B and C of state spaces have these names in the literature.
"""

from longctx_layers.ops.attention import sparse_attention
from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.attention.pattern import Pattern
from longctx_layers.ops.backends import BACKENDS, Choice, explain, register_backend, use_backend
from longctx_layers.ops.conv_silu import conv_silu
from longctx_layers.ops.gated_norms import gated_norms
from longctx_layers.ops.segments import PAD_SEGMENT, Segments
from longctx_layers.ops.state_space.block_ssd import block_ssd
from longctx_layers.ops.state_space.diagonal import diagonal_scan
from longctx_layers.ops.state_space.ssd import ssd
from longctx_layers.ops.state_space.tiles import SSDInputs

__all__ = [
    "BACKENDS",
    "PAD_SEGMENT",
    "Choice",
    "FarKeys",
    "Pattern",
    "SSDInputs",
    "Segments",
    "block_ssd",
    "conv_silu",
    "diagonal_scan",
    "explain",
    "gated_norms",
    "register_backend",
    "sparse_attention",
    "ssd",
    "use_backend",
]
