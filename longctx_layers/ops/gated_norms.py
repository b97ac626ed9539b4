"""The fusion of two paths: a gate per element between their norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import cpu_gated_norms, cpu_support, reference, triton_support
from longctx_layers.ops.backends import Operation
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape

EPS = 1e-5

_operation = Operation("gated_norms")


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of each head, scaled by `[H, P]`: `[..., H, P]` to the same, in float32 at least."""
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
    """`g * RMSNorm(o) + (1 - g) * RMSNorm(s)` with `g = sigmoid(z)` and norms over each head.

    Args:
        z, o, s: the gate's input and both paths, `[B, T, H, P]`.
        weight_o, weight_s: the norms' scales, `[H, P]`; their eps is 1e-5.
        backend: see `longctx_layers.explain`.

    Returns:
        `[B, T, H, P]` in z's dtype, computed in float32 at least and rounded once.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Dong et al., Hymba, arXiv 2411.13676; Zhang and Sennrich, RMSNorm, 1910.07467.
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


@_operation.register("triton", refuse=triton_support.refuse)
def _triton(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    from longctx_layers.kernels.gated_norms import gated_norms as kernel  # imports Triton

    y: Tensor = kernel(z, o, s, weight_o, weight_s, EPS)
    return y


@_operation.register("cpu", refuse=cpu_support.refuse)
def _cpu(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    return cpu_gated_norms.run(z, o, s, weight_o, weight_s, EPS)


@_operation.register("torch")
def _torch(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    o, s = head_norm(o, weight_o), head_norm(s, weight_s)
    return torch.lerp(s, o, torch.sigmoid(z.to(o.dtype))).to(z.dtype)


_operation.register("reference")(reference.gated_norms)
