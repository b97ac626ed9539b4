"""The fusion of two paths: a gate per element between their norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import availability, reference
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.second_order import own_backward

EPS = 1e-5

_PATHS = ("z", "o", "s")
_SCALES = ("weight_o", "weight_s")
_operation = Operation(
    "gated_norms",
    examples={
        "": lambda draw: {
            **{name: draw(2, draw.length, 4, 64) for name in _PATHS},
            **{name: draw(4, 64) for name in _SCALES},
        }
    },
    precise=_SCALES,
)


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of each head of `[..., H, P]`, scaled by `[H, P]`, computed in float32 at least."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(precise), x.shape[-1:], eps=EPS) * weight.to(precise)


def gated_norms(
    z: Tensor,
    o: Tensor,
    s: Tensor,
    weight_o: Tensor,
    weight_s: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mix two paths by a gate: `g * RMSNorm(o) + (1 - g) * RMSNorm(s)` with `g = sigmoid(z)`.

    Args:
        z, o, s: the gate's input and the two paths, `[B, T, H, P]`.
        weight_o, weight_s: scales `[H, P]` of the norms, which are over each head with eps 1e-5.
        backend: see `longctx_layers.explain`.

    Returns:
        `[B, T, H, P]` in z's dtype, computed in float32 at least and rounded once.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Dong et al., Hymba, arXiv 2411.13676; Zhang and Sennrich, RMSNorm, 1910.07467.

    >>> import torch
    >>> z, o, s = torch.randn(3, 1, 5, 2, 8)
    >>> gated_norms(z, o, s, torch.ones(2, 8), torch.ones(2, 8)).shape
    torch.Size([1, 5, 2, 8])
    """
    expect_float("z", z, "[B, T, H, P]")
    if z.dim() != 4:
        raise ValueError(f"z: expected [B, T, H, P], got a tensor of shape {list(z.shape)}")
    for name, path in (("o", o), ("s", s)):
        expect_shape(name, path, tuple(z.shape), "[B, T, H, P], as z")
        expect_dtype(name, path, z.dtype)
    for name, weight in (("weight_o", weight_o), ("weight_s", weight_s)):
        expect_shape(name, weight, tuple(z.shape[2:]), "[H, P]")
    result: Tensor = _operation(z, o, s, weight_o, weight_s, backend=backend)
    return result


@_operation.register("triton", refuse=availability.refuse_triton)
def _triton(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    from longctx_layers.kernels.gated_norms import gated_norms as kernel  # imports Triton

    y: Tensor = kernel(z, o, s, weight_o, weight_s, EPS)
    return y


@_operation.register("cpu")
def _cpu(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    y: Tensor = _GatedNorms.apply(z, o, s, weight_o, weight_s)
    return y


@_operation.register("torch")
def _torch(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    o = head_norm(o, weight_o)
    s = head_norm(s, weight_s)
    return torch.lerp(s, o, torch.sigmoid(z.to(o.dtype))).to(z.dtype)


_operation.register("reference")(reference.gated_norms)


class _GatedNorms(torch.autograd.Function):
    """Forward and backward on a CPU, in place, keeping only the inputs."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z, o, s, weight_o, weight_s)
        precise = torch.promote_types(z.dtype, torch.float32)
        o = (o * _scale(o, precise)).mul_(weight_o.to(precise))
        s = (s * _scale(s, precise)).mul_(weight_s.to(precise))
        return torch.lerp(s, o, torch.sigmoid(z.to(precise)), out=o).to(z.dtype)

    @staticmethod
    @own_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, o, s, weight_o, weight_s = ctx.saved_tensors
        precise = torch.promote_types(z.dtype, torch.float32)
        gate = torch.sigmoid(z.to(precise))
        dy = dy.to(precise)
        share = dy * gate
        do, dweight_o, o = _norm_backward(share, o, weight_o)
        ds, dweight_s, s = _norm_backward(torch.sub(dy, share, out=share), s, weight_s)
        dz = torch.ops.aten.sigmoid_backward(o.sub_(s).mul_(dy), gate)
        return dz.to(z.dtype), do, ds, dweight_o, dweight_s


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and `RMSNorm(x)` itself; dy is not changed."""
    scale = _scale(x, dy.dtype)
    normed = x * scale
    product = dy * normed
    dweight = product.sum((0, 1))
    wide = weight.to(dy.dtype)
    along = product.mul_(wide).mean(-1, keepdim=True)
    dx = torch.mul(dy, wide, out=product).addcmul_(normed, along, value=-1).mul_(scale)
    return dx.to(x.dtype), dweight.to(weight.dtype), normed.mul_(wide)


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / rms` of each head, `[..., H, 1]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
