"""The fusion of a layer's two paths: in one operation where nobody watches the norms."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from longctx_layers.layers.base import HeadNorm
from longctx_layers.layers.pieces import may_bypass
from longctx_layers.ops import gated_norms


def fuse(z: Tensor, o: Tensor, s: Tensor, norm_o: nn.Module, norm_s: nn.Module) -> Tensor:
    """`g * norm_o(o) + (1 - g) * norm_s(s)` with `g = sigmoid(z)`: `[B, T, H, P]` each.

    Norms that have hooks, or that something else has replaced, are called; the operation would
    take no more than their weights.
    """
    if may_bypass(HeadNorm, norm_o, norm_s):
        weight_o, weight_s = (cast("HeadNorm", norm).weight for norm in (norm_o, norm_s))
        return gated_norms(z, o, s, weight_o, weight_s)
    precise = torch.promote_types(z.dtype, torch.float32)
    o, s, gate = norm_o(o).to(precise), norm_s(s).to(precise), torch.sigmoid(z.to(precise))
    return torch.lerp(s, o, gate).to(z.dtype)
