"""RMSNorm of each head, and the gated sum of two normed paths."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from longctx_layers.layers.parameters import SpecialParameters
from longctx_layers.layers.plain_modules import may_bypass
from longctx_layers.ops import gated_norms
from longctx_layers.ops.gated_norms import head_norm


class HeadNorm(SpecialParameters):
    """RMSNorm of each head with a learned scale `[H, P]`: `[B, T, H, P]` to the same."""

    no_decay = ("weight",)

    def __init__(self, n_heads: int, head_dim: int, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_heads, head_dim, **factory))

    def draw_own(self) -> None:
        """Set the scale to its first value."""
        nn.init.constant_(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight).to(x.dtype)


def fuse(z: Tensor, o: Tensor, s: Tensor, norm_o: nn.Module, norm_s: nn.Module) -> Tensor:
    """`g * norm_o(o) + (1 - g) * norm_s(s)` with `g = sigmoid(z)`: `[B, T, H, P]` each.

    The fused operation takes the weights of the norms. Norms that have hooks, or that were
    replaced, are called instead.
    """
    if may_bypass(HeadNorm, norm_o, norm_s):
        weight_o = cast("HeadNorm", norm_o).weight
        weight_s = cast("HeadNorm", norm_s).weight
        return gated_norms(z, o, s, weight_o, weight_s)
    precise = torch.promote_types(z.dtype, torch.float32)
    o = norm_o(o).to(precise)
    s = norm_s(s).to(precise)
    return torch.lerp(s, o, torch.sigmoid(z.to(precise))).to(z.dtype)
