"""Diagonal linear recurrence: `h_t = a_t h_{t-1} + u_t` per channel, and its gradients.

Time is divided into tiles. `_tile_ends` computes what each tile adds to the state and the product
of its decays, `_pass_on` carries the state across tiles, and `_scan` computes the states inside the
tiles. So u is read twice, and all tiles run in parallel. The backward pass is the same recurrence
from right to left.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_three, index_of_two
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import on_its_device

check_import_name(__name__)

TILE = 128  # tokens of a program, processed one by one
CHANNELS = 64  # channels of a program
LAUNCH = {"num_warps": 2, "num_stages": 1}


@triton.jit
def _decay(
    DECAY, START, at, t, d, inside, length, N, INVARIANT: tl.constexpr, PACKED: tl.constexpr
):
    """The decay into token t: 0 at the first token of a segment, 1 at padding.

    Also whether the token is real, and whether it continues the segment of the token before it.
    """
    a = tl.load(DECAY + (d if INVARIANT else at * N + d), mask=inside, other=0.0)
    real = t >= 0
    continues = real
    if PACKED:
        real = t < length
        continues = real & (tl.load(START + at) != t)
        a = tl.where(continues, a, tl.where(real, 0.0, 1.0))
    return a, real, continues


@triton.jit
def _tile_ends(
    X,
    DECAY,
    START,
    LENGTH,
    ENDS,
    THROUGH,
    T,
    N,
    tiles,
    REVERSE: tl.constexpr,
    INVARIANT: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The state at the end of each tile if it begins with zero, and the product of its decays."""
    tile, block, b = index_of_three(tiles, tl.cdiv(N, CHANNELS))
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < N
    length = tl.load(LENGTH + b) if PACKED else T
    h = tl.zeros((CHANNELS,), ENDS.dtype.element_ty)
    through = h + 1
    first = tile.to(tl.int64) * TILE
    count = tl.minimum(TILE, T - first)
    for i in tl.range(0, count, loop_unroll_factor=8):  # to load ahead
        t = first + (count - 1 - i if REVERSE else i)
        at = b * T + t
        x = tl.load(X + at * N + d, mask=inside, other=0.0).to(h.dtype)
        a, real, continues = _decay(DECAY, START, at, t, d, inside, length, N, INVARIANT, PACKED)
        h = a * (h + x) if REVERSE else a * h + tl.where(real, x, 0.0)
        through *= a
    out = (b * tiles + tile) * N + d
    tl.store(ENDS + out, h, mask=inside)
    tl.store(THROUGH + out, through, mask=inside)


@triton.jit
def _pass_on(ENDS, THROUGH, ENTER, BEFORE, N, tiles, REVERSE: tl.constexpr, CHANNELS: tl.constexpr):
    """The state at the beginning of each tile (in reverse: at its end)."""
    block, b = index_of_two(tl.cdiv(N, CHANNELS))
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < N
    h = tl.load(ENTER + b * N + d, mask=inside, other=0.0)
    for i in tl.range(0, tiles, loop_unroll_factor=4):
        at = (b * tiles + (tiles - 1 - i if REVERSE else i)) * N + d
        tl.store(BEFORE + at, h, mask=inside)
        through = tl.load(THROUGH + at, mask=inside, other=0.0)
        h = through * h + tl.load(ENDS + at, mask=inside, other=0.0)


@triton.jit
def _scan(
    U,
    DECAY,
    START,
    LENGTH,
    BEFORE,
    H,
    FINAL,
    T,
    N,
    tiles,
    INVARIANT: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All states of a tile; the last state of the last tile is the final state."""
    tile, block, b = index_of_three(tiles, tl.cdiv(N, CHANNELS))
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < N
    length = tl.load(LENGTH + b) if PACKED else T
    h = tl.load(BEFORE + (b * tiles + tile) * N + d, mask=inside, other=0.0)
    first = tile.to(tl.int64) * TILE
    for i in tl.range(0, tl.minimum(TILE, T - first), loop_unroll_factor=8):
        t = first + i
        at = b * T + t
        u = tl.load(U + at * N + d, mask=inside, other=0.0).to(h.dtype)
        a, real, continues = _decay(DECAY, START, at, t, d, inside, length, N, INVARIANT, PACKED)
        h = a * h + tl.where(real, u, 0.0)
        tl.store(H + at * N + d, h, mask=inside)
    tl.store(FINAL + b * N + d, h, mask=inside & (tile == tiles - 1))


@triton.jit
def _scan_back(
    DH,
    DECAY,
    START,
    LENGTH,
    BEFORE,
    H,
    INITIAL,
    DU,
    DDECAY,
    DINITIAL,
    T,
    N,
    tiles,
    INVARIANT: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of u and of the decays; the first tile also writes that of the initial state."""
    tile, block, b = index_of_three(tiles, tl.cdiv(N, CHANNELS))
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < N
    length = tl.load(LENGTH + b) if PACKED else T
    out = (b * tiles + tile) * N + d
    carry = tl.load(BEFORE + out, mask=inside, other=0.0)
    total = tl.zeros_like(carry)
    first = tile.to(tl.int64) * TILE
    count = tl.minimum(TILE, T - first)
    for i in tl.range(0, count, loop_unroll_factor=4):
        t = first + count - 1 - i
        at = b * T + t
        a, real, continues = _decay(DECAY, START, at, t, d, inside, length, N, INVARIANT, PACKED)
        gradient = carry + tl.load(DH + at * N + d, mask=inside, other=0.0)
        tl.store(DU + at * N + d, tl.where(real, gradient, 0.0), mask=inside)
        carry = a * gradient
        earlier = tl.load(H + (at - 1) * N + d, mask=inside & (t > 0), other=0.0)
        earlier += tl.load(INITIAL + b * N + d, mask=inside & (t == 0), other=0.0)
        of_decay = tl.where(continues, gradient * earlier, 0.0)
        if INVARIANT:
            total += of_decay
        else:
            tl.store(DDECAY + at * N + d, of_decay, mask=inside)
    if INVARIANT:
        tl.store(DDECAY + out, total, mask=inside)
    tl.store(DINITIAL + b * N + d, carry, mask=inside & (tile == 0))


def _entering(
    x: Tensor,
    decay: Tensor,
    enter: Tensor,
    start: Tensor | None,
    length: Tensor | None,
    reverse: bool,
) -> Tensor:
    """The state that enters each tile, `[B, tiles, N]`."""
    batch, total, channels = x.shape
    tiles = triton.cdiv(total, TILE)
    if tiles == 1:
        return enter[:, None].contiguous()
    ends = enter.new_empty(batch, tiles, channels)
    through, before = torch.empty_like(ends), torch.empty_like(ends)
    blocks = triton.cdiv(channels, CHANNELS)
    _tile_ends[grid(tiles, blocks, batch)](
        x,
        decay,
        start,
        length,
        ends,
        through,
        total,
        channels,
        tiles,
        reverse,
        decay.dim() == 1,
        start is not None,
        TILE,
        CHANNELS,
        **LAUNCH,
    )
    _pass_on[grid(blocks, batch)](
        ends, through, enter, before, channels, tiles, reverse, CHANNELS, **LAUNCH
    )
    return before


def forward(
    u: Tensor,
    decay: Tensor,
    initial_state: Tensor,
    start: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states `[B, T, N]` and the final one `[B, N]`, in the initial state's dtype.

    Args:
        u: `[B, T, N]`, T at least 1.
        decay: `[N]` or `[B, T, N]`, in the initial state's dtype.
        initial_state: `[B, N]`, float32 or float64.
        start, length: see `Segments`; None for one segment without padding.
    """
    u, decay, initial_state = (x.contiguous() for x in (u, decay, initial_state))
    start = None if start is None else start.contiguous()
    batch, total, channels = u.shape
    tiles = triton.cdiv(total, TILE)
    before = _entering(u, decay, initial_state, start, length, False)
    h, final = initial_state.new_empty(u.shape), torch.empty_like(initial_state)
    _scan[grid(tiles, triton.cdiv(channels, CHANNELS), batch)](
        u,
        decay,
        start,
        length,
        before,
        h,
        final,
        total,
        channels,
        tiles,
        decay.dim() == 1,
        start is not None,
        TILE,
        CHANNELS,
        **LAUNCH,
    )
    return h, final


def backward(
    dh: Tensor,
    dfinal: Tensor,
    h: Tensor,
    decay: Tensor,
    initial_state: Tensor,
    start: Tensor | None,
    length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, decay and the initial state, in the initial state's dtype."""
    dh, dfinal, decay, initial_state = (x.contiguous() for x in (dh, dfinal, decay, initial_state))
    start = None if start is None else start.contiguous()
    batch, total, channels = dh.shape
    tiles, invariant = triton.cdiv(total, TILE), decay.dim() == 1
    before = _entering(dh, decay, dfinal, start, length, True)
    du, dinitial = torch.empty_like(dh), torch.empty_like(initial_state)
    ddecay = dh.new_empty(batch, tiles if invariant else total, channels)
    _scan_back[grid(tiles, triton.cdiv(channels, CHANNELS), batch)](
        dh,
        decay,
        start,
        length,
        before,
        h,
        initial_state,
        du,
        ddecay,
        dinitial,
        total,
        channels,
        tiles,
        invariant,
        start is not None,
        TILE,
        CHANNELS,
        **LAUNCH,
    )
    return du, ddecay.sum((0, 1)) if invariant else ddecay, dinitial


diagonal_scan = torch.library.custom_op(
    "longctx::diagonal_scan",
    on_its_device(forward),
    mutates_args=(),
    schema="(Tensor u, Tensor decay, Tensor initial_state, Tensor? start=None,"
    " Tensor? length=None) -> (Tensor, Tensor)",
)


@diagonal_scan.register_fake
def _(u: Tensor, decay: Tensor, initial_state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return initial_state.new_empty(u.shape), torch.empty_like(initial_state)


_diagonal_scan_backward = torch.library.custom_op(
    "longctx::diagonal_scan_backward",
    on_its_device(backward),
    mutates_args=(),
    schema="(Tensor dh, Tensor dfinal, Tensor h, Tensor decay, Tensor initial_state,"
    " Tensor? start, Tensor? length) -> (Tensor, Tensor, Tensor)",
)


@_diagonal_scan_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, h: Tensor, decay: Tensor, initial_state: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(decay), torch.empty_like(initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, decay, initial_state, start, length = inputs
    ctx.dtype = u.dtype
    ctx.save_for_backward(output[0], decay, initial_state, start, length)


def _gradients(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    du, ddecay, dinitial = _diagonal_scan_backward(dh, dfinal, *ctx.saved_tensors)
    return du.to(ctx.dtype), ddecay, dinitial, None, None


diagonal_scan.register_autograd(_gradients, setup_context=_save)
