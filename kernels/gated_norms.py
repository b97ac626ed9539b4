"""`g * RMSNorm(o) + (1 - g) * RMSNorm(s)`, `g = sigmoid(z)`, in one pass, and its gradients.

A program takes some tokens of one head. The backward pass recomputes norms and gate, so that only
the inputs are saved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_two
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import on_its_device

check_import_name(__name__)

ELEMENTS = 2048  # of a program: tokens times the padded head_dim
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _normed(X, at, mask, P, EPS: tl.constexpr, PRECISE: tl.constexpr):
    """x / rms(x), and 1 / rms(x) of each token."""
    x = tl.load(X + at, mask=mask, other=0.0).to(PRECISE)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / P + EPS)
    return x * scale[:, None], scale


@triton.jit
def _forward(
    Z,
    O,
    S,
    WO,
    WS,
    Y,
    tokens,
    H,
    P,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    head, block = index_of_two(H)
    row = block * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, BLOCK)
    at = (row * H + head)[:, None] * P + p
    mask = (row < tokens)[:, None] & (p < P)
    gate = tl.sigmoid(tl.load(Z + at, mask=mask, other=0.0).to(PRECISE))
    o, _ = _normed(O, at, mask, P, EPS, PRECISE)
    s, _ = _normed(S, at, mask, P, EPS, PRECISE)
    o *= tl.load(WO + head * P + p, mask=p < P, other=0.0).to(PRECISE)
    s *= tl.load(WS + head * P + p, mask=p < P, other=0.0).to(PRECISE)
    tl.store(Y + at, (s + gate * (o - s)).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _through_norm(normed, scale, gradient, P):
    """The gradient of the input of a norm."""
    return scale[:, None] * (gradient - normed * (tl.sum(gradient * normed, 1) / P)[:, None])


@triton.jit
def _backward(
    DY,
    Z,
    O,
    S,
    WO,
    WS,
    DZ,
    DO,
    DS,
    DWO,
    DWS,
    tokens,
    H,
    P,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    head, block = index_of_two(H)
    row = block * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, BLOCK)
    at = (row * H + head)[:, None] * P + p
    mask = (row < tokens)[:, None] & (p < P)
    dy = tl.load(DY + at, mask=mask, other=0.0).to(PRECISE)
    gate = tl.sigmoid(tl.load(Z + at, mask=mask, other=0.0).to(PRECISE))
    o, scale_o = _normed(O, at, mask, P, EPS, PRECISE)
    s, scale_s = _normed(S, at, mask, P, EPS, PRECISE)
    weight_o = tl.load(WO + head * P + p, mask=p < P, other=0.0).to(PRECISE)
    weight_s = tl.load(WS + head * P + p, mask=p < P, other=0.0).to(PRECISE)
    dz = dy * (o * weight_o - s * weight_s) * gate * (1 - gate)
    tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=mask)
    to_o, to_s = dy * gate, dy * (1 - gate)
    do = _through_norm(o, scale_o, to_o * weight_o, P)
    ds = _through_norm(s, scale_s, to_s * weight_s, P)
    tl.store(DO + at, do.to(DO.dtype.element_ty), mask=mask)
    tl.store(DS + at, ds.to(DS.dtype.element_ty), mask=mask)
    out = (block * H + head) * P + p
    tl.store(DWO + out, tl.sum(to_o * o, 0), mask=p < P)
    tl.store(DWS + out, tl.sum(to_s * s, 0), mask=p < P)


def _shape(z: Tensor, eps: float) -> tuple[int, tuple[Any, ...]]:
    """The number of blocks of tokens, and the last arguments of both kernels."""
    batch, length, heads, dim = z.shape
    block = triton.next_power_of_2(dim)
    rows = max(1, ELEMENTS // block)
    precise = tl.float64 if z.dtype == torch.float64 else tl.float32
    tokens = batch * length
    return triton.cdiv(tokens, rows), (tokens, heads, dim, eps, rows, block, precise)


def forward(
    z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor, eps: float
) -> Tensor:
    """The output `[B, T, H, P]`, from z, o and s of that shape and weights `[H, P]`."""
    z, o, s, weight_o, weight_s = (x.contiguous() for x in (z, o, s, weight_o, weight_s))
    y = z.new_empty(z.shape)
    blocks, shape = _shape(z, eps)
    _forward[grid(z.shape[2], blocks)](z, o, s, weight_o, weight_s, y, *shape, **LAUNCH)
    return y


def backward(
    dy: Tensor, z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, o, s, weight_o and weight_s."""
    inputs = [x.contiguous() for x in (dy, z, o, s, weight_o, weight_s)]
    dz, do, ds = (x.new_empty(x.shape) for x in inputs[1:4])
    blocks, shape = _shape(z, eps)
    precise = torch.promote_types(z.dtype, torch.float32)
    dw_o, dw_s = (z.new_empty(blocks, *weight_o.shape, dtype=precise) for _ in range(2))
    _backward[grid(z.shape[2], blocks)](*inputs, dz, do, ds, dw_o, dw_s, *shape, **LAUNCH)
    return dz, do, ds, dw_o.sum(0).to(weight_o.dtype), dw_s.sum(0).to(weight_s.dtype)


gated_norms = torch.library.custom_op(
    "longctx::gated_norms",
    on_its_device(forward),
    mutates_args=(),
    schema="(Tensor z, Tensor o, Tensor s, Tensor weight_o, Tensor weight_s, float eps) -> Tensor",
)


@gated_norms.register_fake
def _(z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


_gated_norms_backward = torch.library.custom_op(
    "longctx::gated_norms_backward",
    on_its_device(backward),
    mutates_args=(),
    schema="(Tensor dy, Tensor z, Tensor o, Tensor s, Tensor weight_o, Tensor weight_s, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_gated_norms_backward.register_fake
def _(
    dy: Tensor, z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (z, o, s, weight_o, weight_s))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gated_norms_backward(dy, *ctx.saved_tensors, ctx.eps), None)


gated_norms.register_autograd(_gradients, setup_context=_save)
