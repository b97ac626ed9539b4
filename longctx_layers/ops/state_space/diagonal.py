"""Linear recurrences: the carry across tiles that all of them share, and the diagonal one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import reference, triton_support
from longctx_layers.ops.backends import Operation
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape, expect_tensor
from longctx_layers.ops.second_order import forward_mode
from longctx_layers.ops.segments import Segments, cover, shortened

_TILE = 64
# exp of this is 0 in every dtype, and sums of many of them stay exact enough in float64.
MIN_LOG_DECAY = -1e4

_operation = Operation("diagonal_scan")


def diagonal_scan(
    u: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal linear recurrence `h_t = exp(log_decay_t) * h_{t-1} + u_t`, per channel.

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


@_operation.register("triton", refuse=triton_support.refuse)
def _triton(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    from longctx_layers.kernels.diagonal import diagonal_scan as kernel  # imports Triton

    start, length = (None, None) if segments is None else (segments.start, segments.length)
    # The exponential is torch's: an error of the GPU's fast one would grow with the time scale.
    decay = log_decay.to(initial_state.dtype).exp()
    h, final = kernel(u, decay, initial_state, start, length)
    return h.to(u.dtype), final


@_operation.register("torch")
def _torch(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    dtype, state = u.dtype, initial_state
    u, log_decay = u.to(state.dtype), log_decay.to(state.dtype).clamp(min=MIN_LOG_DECAY)
    if segments is not None:
        real = segments.real()[..., None]
        u, log_decay = torch.where(real, u, 0), torch.where(real, log_decay, 0)
    batch, length, channels = u.shape
    if length == 1:
        if segments is not None:
            state = torch.where(segments.start < 0, state, 0)
        final = torch.exp(log_decay).reshape(-1, channels) * state + u[:, 0]
        return final[:, None].to(dtype), final
    tile = shortened(_TILE, length)
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
    # At pads the state stands still, so the last one is the final one of every row.
    return h.to(dtype), h[:, -1].clone()


def _invariant_tiles(u: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Within tiles from a zero state: one small matrix of decays per channel, for all tiles."""
    batch, tiles, tile, _ = u.shape
    age = torch.arange(tile, device=u.device)
    age = age[:, None] - age
    decay = torch.exp(log_decay[:, None, None] * age.clamp(min=0)).tril()
    local = decay @ u.permute(3, 2, 0, 1).flatten(2)
    steps = torch.arange(1, tile + 1, device=u.device)[:, None]
    return local.unflatten(2, (batch, tiles)).permute(2, 3, 1, 0), torch.exp(log_decay * steps)


def _varying_tiles(u: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Within tiles from a zero state, by doubling: log2(tile) steps over all tokens at once."""
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


def tile_starts(start: Tensor, tiles: int, tile: int) -> Tensor:
    """Segment starts `[B, T]` cut into tiles `[B, tiles, tile]`; padding repeats the last one."""
    batch, length = start.shape
    tail = start[:, -1:].expand(batch, tiles * tile - length)
    return torch.cat([start, tail], dim=1).unflatten(1, (tiles, tile))


def running_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Inclusive cumulative sums along a dimension.

    torch has no deterministic cumsum of floats on a GPU: under
    `torch.use_deterministic_algorithms` this doubles the summed span instead, log2(length) times.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    return _doubled_sum(x.movedim(dim, -1)).movedim(-1, dim)


def _doubled_sum(x: Tensor) -> Tensor:
    step = 1
    while step < x.shape[-1]:
        x = x + F.pad(x[..., :-step], (step, 0))
        step *= 2
    return x


def segment_sums(log_decay: Tensor) -> Tensor:
    """Inclusive cumulative sums over the last dimension, in float64 where the device has it.

    Decays between two tokens are exponentials of differences of these sums, which would lose all
    precision in float32 behind one very strong decay.
    """
    wide = log_decay.dtype if log_decay.device.type == "mps" else torch.float64
    return running_sum(log_decay.to(wide))


class _PreciseDifference(torch.autograd.Function):
    """`reader_t - source_s` in a narrower dtype, with gradients summed in the inputs' float64.

    The gradient of one token's decay is a small difference of large such sums.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(reader: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
        return reader.to(dtype)[..., None] - source.to(dtype)[..., None, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.wide, ctx.dtype = inputs[0].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient.sum(-1, dtype=ctx.wide), -gradient.sum(-2, dtype=ctx.wide), None


class _PreciseDifferenceForward(_PreciseDifference):
    """The same with a rule for forward-mode derivatives, which torch.compile refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, reader: Tensor, source: Tensor, _: None) -> Tensor:
        return (reader[..., None] - source[..., None, :]).to(ctx.dtype)


def decay_between(reader: Tensor, source: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`exp(reader_t - source_s)` where mask allows, else 0: `[..., T, S]`.

    The sums come in float64; their difference is taken in `dtype`, without loss, as the
    difference of their leading parts plus that of their remainders. Only the remainders carry
    gradients.
    """
    if dtype == reader.dtype:
        exponent = reader[..., None] - source[..., None, :]
    else:
        lead = reader.detach().to(dtype), source.detach().to(dtype)
        exponent = lead[0][..., None] - lead[1][..., None, :]
        forward = not torch.compiler.is_compiling() and forward_mode()
        difference = _PreciseDifferenceForward if forward else _PreciseDifference
        exponent = exponent + difference.apply(reader - lead[0], source - lead[1], dtype)
    return exponent.masked_fill(~mask, -math.inf).exp()


def carry(
    states: Tensor, log_total: Tensor, initial: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence across tiles, `h_c = exp(log_total_c) * h_{c-1} + states_c`, without a loop.

    Two levels of about sqrt(n) tiles each (32 in a compiled graph), so that time and memory stay
    far below n squared, and no loop depends on the length: torch.compile takes a dynamic one.

    Args:
        states: what each tile adds, `[B, n, H, K]`.
        log_total: logarithm of each whole tile's decay, `[B, n, H]`.
        initial: state before the first tile, `[B, H, K]`.
        first: `[B, n]`, the first tile whose sum reaches the end of each tile; below 0 if the
            initial state does too; None if all do.

    Returns:
        The states before each tile, `[B, n, H, K]`, and the one behind the last, `[B, H, K]`.
    """
    # The initial state is a tile of its own, in front.
    states = torch.cat([initial[:, None], states], dim=1)
    log_total = F.pad(log_total, (0, 0, 1, 0))
    first = None if first is None else F.pad(first + 1, (1, 0)).clamp(min=0)
    tiles = states.shape[1]
    # A traced length gets a constant, since symbolic roots take the compiler minutes.
    group = 32 if torch.compiler.is_compiling() else math.isqrt(tiles)
    groups = cover(tiles, group)
    pad = groups * group - tiles
    states = F.pad(states, (0, 0, 0, 0, 0, pad)).unflatten(1, (groups, group))
    sums = segment_sums(F.pad(log_total, (0, 0, 0, pad)).unflatten(1, (groups, group)).mT)
    index = torch.arange(groups * group, device=states.device).unflatten(0, (groups, group))
    if first is None:
        first = torch.zeros_like(index)[None]
    else:
        first = F.pad(first, (0, pad)).unflatten(1, (groups, group))
    # Inside the groups: [B, groups, H, group, group] @ [B, groups, H, group, K].
    mask = (index[:, None] <= index[..., None]) & (index[:, None] >= first[..., None])
    inside = decay_between(sums, sums, mask[:, :, None], states.dtype) @ states.transpose(2, 3)
    # From group to group: what stands at the end of all earlier groups.
    ends, total = inside[..., -1, :], running_sum(sums[..., -1].mT)
    row = torch.arange(groups, device=states.device)
    alive = (row < row[:, None]) & (
        row >= (F.pad(first[..., -1], (1, 0))[:, :-1] // group)[..., None]
    )
    before = F.pad(total, (1, 0))[..., :-1]
    across = decay_between(before, total, alive[:, None], states.dtype) @ ends.transpose(1, 2)
    # The state before a group decays on to each of its tiles, unless a segment began since.
    reach = first < index[:, :1]
    fade = sums.exp().to(states.dtype) * reach[:, :, None]
    after = inside + fade[..., None] * across.transpose(1, 2)[..., None, :]
    after = after.transpose(2, 3).flatten(1, 2)[:, :tiles]
    # A copy: as a view, the final state would keep all of them alive.
    return after[:, :-1], after[:, -1].clone()


_operation.register("reference")(reference.diagonal_scan)
