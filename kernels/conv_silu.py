"""Causal convolution per channel with SiLU in one pass, and its gradients.

A program takes a tile of tokens and channels, and reads the few tokens before the tile again. The
backward pass recomputes the convolution, writes the gradient of its output before SiLU, and gathers
the gradient of x from that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_three
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import on_its_device

check_import_name(__name__)

TOKENS = 32  # per program
CHANNELS = 64
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _input(
    X,
    BEFORE,
    b,
    source,
    start,
    real,
    c,
    T,
    C,
    WIDTH: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """`x` at the source tokens; 0 where they belong to another segment, or are padding."""
    if PACKED:
        real = real & (source >= start)
    mask = real[:, None] & (c < C)[None, :]
    here = (b * T + source)[:, None] * C + c
    x = tl.load(X + here, mask=mask & (source >= 0)[:, None], other=0.0).to(PRECISE)
    if HAS_BEFORE:
        there = (b * (WIDTH - 1) + WIDTH - 1 + source)[:, None] * C + c
        x += tl.load(BEFORE + there, mask=mask & (source < 0)[:, None], other=0.0).to(PRECISE)
    return x


@triton.jit
def _convolved(
    X,
    W,
    BEFORE,
    START,
    T,
    C,
    WIDTH: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The program's row, tile, tokens, starts of their segments, channels, and the convolution."""
    tile, block, b = index_of_three(tl.cdiv(T, TOKENS), tl.cdiv(C, CHANNELS))
    t = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.load(START + b * T + t, mask=t < T, other=0) if PACKED else t
    y = tl.zeros((TOKENS, CHANNELS), PRECISE)
    for back in tl.static_range(WIDTH):
        x = _input(
            X, BEFORE, b, t - back, start, t < T, c, T, C, WIDTH, HAS_BEFORE, PACKED, PRECISE
        )
        y += x * tl.load(W + c * WIDTH + (WIDTH - 1 - back), mask=c < C, other=0.0).to(PRECISE)
    return b, tile, t, start, c, y


@triton.jit
def _forward(
    X,
    W,
    BEFORE,
    START,
    Y,
    T,
    C,
    WIDTH: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    b, tile, t, start, c, y = _convolved(
        X, W, BEFORE, START, T, C, WIDTH, HAS_BEFORE, PACKED, TOKENS, CHANNELS, PRECISE
    )
    y *= tl.sigmoid(y)
    out = (b * T + t)[:, None] * C + c
    tl.store(Y + out, y.to(Y.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _through_silu(
    DY,
    X,
    W,
    BEFORE,
    START,
    INNER,
    DW,
    T,
    C,
    WIDTH: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The gradient of the convolution's output, and the tile's part of the weights' gradient."""
    b, tile, t, start, c, y = _convolved(
        X, W, BEFORE, START, T, C, WIDTH, HAS_BEFORE, PACKED, TOKENS, CHANNELS, PRECISE
    )
    gate = tl.sigmoid(y)
    at = (b * T + t)[:, None] * C + c
    mask = (t < T)[:, None] & (c < C)[None, :]
    inner = tl.load(DY + at, mask=mask, other=0.0).to(PRECISE) * gate * (1 + y * (1 - gate))
    tl.store(INNER + at, inner, mask=mask)
    tile += b * tl.cdiv(T, TOKENS)
    for back in tl.static_range(WIDTH):
        x = _input(
            X, BEFORE, b, t - back, start, t < T, c, T, C, WIDTH, HAS_BEFORE, PACKED, PRECISE
        )
        out = (tile * WIDTH + (WIDTH - 1 - back)) * C + c
        tl.store(DW + out, tl.sum(inner * x, 0), mask=c < C)


@triton.jit
def _gather(
    INNER,
    W,
    START,
    DX,
    DBEFORE,
    T,
    C,
    WIDTH: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradients of x and of the inputs before it, summed over the few tokens that read them."""
    tile, block, b = index_of_three(tl.cdiv(T + WIDTH - 1, TOKENS), tl.cdiv(C, CHANNELS))
    source = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS) - (WIDTH - 1)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    dx = tl.zeros((TOKENS, CHANNELS), PRECISE)
    for back in tl.static_range(WIDTH):
        t = source + back
        reads = (t >= 0) & (t < T)
        if PACKED:
            reads = reads & (source >= tl.load(START + b * T + t, mask=reads, other=0))
        mask = reads[:, None] & (c < C)[None, :]
        inner = tl.load(INNER + (b * T + t)[:, None] * C + c, mask=mask, other=0.0)
        dx += inner * tl.load(W + c * WIDTH + (WIDTH - 1 - back), mask=c < C, other=0.0).to(PRECISE)
    mask = (c < C)[None, :] & (source < T)[:, None]
    here = (b * T + source)[:, None] * C + c
    tl.store(DX + here, dx.to(DX.dtype.element_ty), mask=mask & (source >= 0)[:, None])
    if HAS_BEFORE:
        there = (b * (WIDTH - 1) + WIDTH - 1 + source)[:, None] * C + c
        dx = dx.to(DBEFORE.dtype.element_ty)
        tl.store(DBEFORE + there, dx, mask=mask & (source < 0)[:, None])


def _shape(
    x: Tensor, weight: Tensor, before: Tensor | None, start: Tensor | None
) -> tuple[int, tuple[Any, ...]]:
    """The number of blocks of channels, and the last arguments of all kernels."""
    precise = tl.float64 if x.dtype == torch.float64 else tl.float32
    options = (weight.shape[1], before is not None, start is not None, TOKENS, CHANNELS, precise)
    return triton.cdiv(x.shape[2], CHANNELS), options


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
    x: Tensor, weight: Tensor, before: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """`[B, T, C]`; see `longctx_layers.ops.conv_silu`."""
    x, weight, before, start = _contiguous(x, weight, before, start)
    (batch, length, channels), y = x.shape, x.new_empty(x.shape)
    blocks, options = _shape(x, weight, before, start)
    _forward[grid(triton.cdiv(length, TOKENS), blocks, batch)](
        x, weight, before, start, y, length, channels, *options, **LAUNCH
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, before: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and before; the last one is empty if `before` is None."""
    dy, x, weight, before, start = _contiguous(dy, x, weight, before, start)
    (batch, length, channels), width = x.shape, weight.shape[1]
    blocks, options = _shape(x, weight, before, start)
    tiles = triton.cdiv(length, TOKENS)
    inner = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    dweight = inner.new_empty(batch, tiles, width, channels)
    _through_silu[grid(tiles, blocks, batch)](
        dy, x, weight, before, start, inner, dweight, length, channels, *options, **LAUNCH
    )
    dx = x.new_empty(x.shape)
    dbefore = x.new_empty(0) if before is None else x.new_empty(before.shape)
    _gather[grid(triton.cdiv(length + width - 1, TOKENS), blocks, batch)](
        inner, weight, start, dx, dbefore, length, channels, *options, **LAUNCH
    )
    return dx, dweight.sum((0, 1)).T.to(weight.dtype).contiguous(), dbefore


conv_silu = torch.library.custom_op(
    "longctx::conv_silu",
    on_its_device(forward),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? before=None, Tensor? start=None) -> Tensor",
)


@conv_silu.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_conv_silu_backward = torch.library.custom_op(
    "longctx::conv_silu_backward",
    on_its_device(backward),
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? before, Tensor? start)"
    " -> (Tensor, Tensor, Tensor)",
)


@_conv_silu_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, before: Tensor | None, start: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (0,) if before is None else before.shape
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: with checkpointing, each read recomputes them
    dx, dweight, dbefore = _conv_silu_backward(dy, *saved)
    return dx, dweight, None if saved[2] is None else dbefore, None


conv_silu.register_autograd(_gradients, setup_context=_save)
