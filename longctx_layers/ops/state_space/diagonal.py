"""The diagonal linear recurrence, per channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import availability, reference
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape, expect_tensor
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.segments import Segments, clip_tile, cover
from longctx_layers.ops.state_space.tiles import (
    MIN_LOG_DECAY,
    TILE,
    carry,
    segment_sums,
    tile_starts,
)

_operation = Operation(
    "diagonal_scan",
    examples={
        "": lambda draw: {"u": draw(2, draw.length, 96), "log_decay": -draw(96).abs() / 8},
        "packed": lambda draw: {
            "u": draw(2, draw.length, 96),
            "log_decay": -draw(2, draw.length, 96).abs() / 8,
            "initial_state": draw(2, 96),
            "segments": draw.segments(),
        },
    },
    precise=("log_decay", "initial_state"),
)


def diagonal_scan(
    u: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal linear recurrence: `h_t = exp(log_decay_t) * h_{t-1} + u_t` in each channel.

    Args:
        u: inputs `[B, T, N]`.
        log_decay: logarithms of the decays, at most 0: `[N]` (time-invariant) or `[B, T, N]`.
        initial_state: `[B, N]`, h before the first token; None for zero.
        segments: where the recurrence restarts from zero, and where rows end; None for neither.
        backend: see `longctx_layers.explain`.

    Returns:
        All states `[B, T, N]` in u's dtype, and the final one `[B, N]`, at least float32.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Gu et al., S4D, arXiv 2206.11893; Orvieto et al., LRU, 2303.06349.

    >>> import torch
    >>> h, final = diagonal_scan(torch.ones(1, 3, 1), torch.tensor([0.5]).log())
    >>> h[0, :, 0]
    tensor([1.0000, 1.5000, 1.7500])
    """
    expect_float("u", u, "[B, T, N]")
    expect_tensor("log_decay", log_decay, "[N] or [B, T, N]")
    if u.dim() != 3:
        raise ValueError(f"u: expected [B, T, N], got a tensor of shape {list(u.shape)}")
    batch, length, channels = u.shape
    expected = (channels,) if log_decay.dim() == 1 else (batch, length, channels)
    expect_shape("log_decay", log_decay, expected, "[N] or [B, T, N]")
    precise = torch.promote_types(u.dtype, torch.float32)
    if initial_state is None:
        initial_state = u.new_zeros(batch, channels, dtype=precise)
    expect_shape("initial_state", initial_state, (batch, channels), "[B, N]")
    expect_dtype("initial_state", initial_state, precise)
    if segments is not None:
        expect_shape("segments.start", segments.start, (batch, length), "[B, T]")
    if length == 0:
        return u, initial_state
    result: tuple[Tensor, Tensor] = _operation(
        u, log_decay, initial_state=initial_state, segments=segments, backend=backend
    )
    return result


@_operation.register("triton", refuse=availability.refuse_triton)
def _triton(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    from longctx_layers.kernels.diagonal import diagonal_scan as kernel  # imports Triton

    start = None if segments is None else segments.start
    length = None if segments is None else segments.length
    # torch's exponential: an error of the GPU's fast one would grow with the time scale.
    decay = log_decay.to(initial_state.dtype).exp()
    h, final = kernel(u, decay, initial_state, start, length)
    return h.to(u.dtype), final


@_operation.register("torch")
def _torch(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    dtype = u.dtype
    state = initial_state
    u = u.to(state.dtype)
    log_decay = log_decay.to(state.dtype).clamp(min=MIN_LOG_DECAY)
    if segments is not None:
        real = segments.real()[..., None]
        u = torch.where(real, u, 0)
        log_decay = torch.where(real, log_decay, 0)
    batch, length, channels = u.shape
    if length == 1:
        if segments is not None:
            state = torch.where(segments.start < 0, state, 0)
        final = torch.exp(log_decay).reshape(-1, channels) * state + u[:, 0]
        return final[:, None].to(dtype), final
    tile = clip_tile(TILE, length)
    tiles = cover(length, tile)
    pad = tiles * tile - length
    u = F.pad(u, (0, 0, 0, pad)).unflatten(1, (tiles, tile))
    starts = first = None
    if log_decay.dim() == 1 and segments is None:
        local, cumulative = _invariant_tiles(u, log_decay)
        log_total = (log_decay * tile).expand(batch, tiles, -1)
    else:
        log_decay = F.pad(log_decay.expand(batch, length, -1), (0, 0, 0, pad))
        log_decay = log_decay.unflatten(1, (tiles, tile))
        if segments is not None:
            starts = tile_starts(segments.start, tiles, tile)
            first = starts[..., -1] // tile
        local, cumulative = _varying_tiles(u, log_decay, starts)
        log_total = log_decay.sum(2)
    before, _ = carry(local[:, :, -1, :, None], log_total, state[..., None], first)
    h = (local + cumulative * before.mT).flatten(1, 2)[:, :length]
    # Padding leaves the state as it is, so the last one is the final one of every row.
    return h.to(dtype), h[:, -1].clone()


def _invariant_tiles(u: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """States within tiles from zero, and decays: one small matrix per channel, for all tiles."""
    batch, tiles, tile, _ = u.shape
    age = torch.arange(tile, device=u.device)
    age = age[:, None] - age
    decay = torch.exp(log_decay[:, None, None] * age.clamp(min=0)).tril()
    local = decay @ u.permute(3, 2, 0, 1).flatten(2)
    steps = torch.arange(1, tile + 1, device=u.device)[:, None]
    return local.unflatten(2, (batch, tiles)).permute(2, 3, 1, 0), torch.exp(log_decay * steps)


def _varying_tiles(u: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """States within tiles from zero, and decays, by doubling: log2(tile) steps over all tokens."""
    tile = u.shape[2]
    # Decays over many tokens come from sums of logarithms: products of rounded ones drift.
    sums = segment_sums(log_decay.mT).mT
    decay = torch.exp(log_decay)
    alive = torch.ones_like(decay, dtype=torch.bool)
    if starts is not None:
        begins = torch.arange(starts.shape[1] * starts.shape[2], device=u.device)
        alive = (starts != begins.view(starts.shape[1:]))[..., None].expand_as(decay)
        decay = torch.where(alive, decay, 0)
    step = 1
    while step < tile:
        shifted = F.pad(u[:, :, :-step], (0, 0, step, 0))
        u = u + decay * shifted
        alive = alive & F.pad(alive[:, :, :-step], (0, 0, step, 0), value=True)
        step *= 2
        behind = F.pad(sums[:, :, :-step], (0, 0, min(step, tile), 0))
        decay = torch.where(alive, (sums - behind).exp().to(u.dtype), 0)
    return u, decay


_operation.register("reference")(reference.diagonal_scan)
