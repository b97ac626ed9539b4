"""The gated norms on a CPU: forward and backward in place, keeping nothing but the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def run(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor, eps: float) -> Tensor:
    """`longctx_layers.ops.gated_norms` on a CPU."""
    y: Tensor = _GatedNorms.apply(z, o, s, weight_o, weight_s, eps)
    return y


class _GatedNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(z, o, s, weight_o, weight_s)
        ctx.eps, precise = eps, torch.promote_types(z.dtype, torch.float32)
        o, s = (
            (x * _scale(x, eps, precise)).mul_(weight.to(precise))
            for x, weight in ((o, weight_o), (s, weight_s))
        )
        return torch.lerp(s, o, torch.sigmoid(z.to(precise)), out=o).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, o, s, weight_o, weight_s = ctx.saved_tensors
        precise = torch.promote_types(z.dtype, torch.float32)
        gate, dy = torch.sigmoid(z.to(precise)), dy.to(precise)
        share = dy * gate
        do, dweight_o, o = _norm_backward(share, o, weight_o, ctx.eps)
        ds, dweight_s, s = _norm_backward(torch.sub(dy, share, out=share), s, weight_s, ctx.eps)
        dz = torch.ops.aten.sigmoid_backward(o.sub_(s).mul_(dy), gate)
        return dz.to(z.dtype), do, ds, dweight_o, dweight_s, None


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and `RMSNorm(x)` itself; dy is kept."""
    scale = _scale(x, eps, dy.dtype)
    normed = x * scale
    product = dy * normed
    dweight = product.sum((0, 1))
    wide = weight.to(dy.dtype)
    along = product.mul_(wide).mean(-1, keepdim=True)
    dx = torch.mul(dy, wide, out=product).addcmul_(normed, along, value=-1).mul_(scale)
    return dx.to(x.dtype), dweight.to(weight.dtype), normed.mul_(wide)


def _scale(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`1 / rms` of each head, `[..., H, 1]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
