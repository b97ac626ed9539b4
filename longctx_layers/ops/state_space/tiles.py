"""What the state-space operations share: inputs cut into tiles, decays, and the carry over tiles.

Shapes here: n tiles of L tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.operation import forward_mode
from longctx_layers.ops.segments import Segments, cover

TILE = 64
# exp of this is 0 in every dtype, and sums of many of them stay exact enough in float64.
MIN_LOG_DECAY = -1e4


class SSDInputs(NamedTuple):
    """Inputs of `ssd` and `block_ssd`, as their backends take them.

    Attributes:
        x: inputs `[B, T, H, P]`.
        dt: step sizes `[B, T, H]`, at least 0.
        A: `[H]`, negative: the state decays by `exp(dt A)` per token.
        B, C: write and read directions `[B, T, N]`, shared by the heads.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def steps(self, precise: torch.dtype, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """Step sizes and the log-decays they cause, both in a dtype; 0 for padding."""
        dt = self.dt
        if segments is not None:
            dt = torch.where(segments.real()[..., None], dt, 0)
        dt = dt.to(precise)
        return dt, (dt * self.A.to(precise)).clamp(min=MIN_LOG_DECAY)


class Writes:
    """Inputs in the state's precision, steps multiplied in; padding neither writes nor decays."""

    def __init__(self, inputs: SSDInputs, precise: torch.dtype, segments: Segments | None) -> None:
        dt, self.log_decay = inputs.steps(precise, segments)
        self.u = inputs.x.to(precise) * dt[..., None]
        self.B = inputs.B.to(precise)
        self.C = inputs.C.to(precise)
        self.start = None if segments is None else segments.start

    def step(self, state: Tensor, alive: Tensor | None, write: bool = True) -> Tensor:
        """The state after a single token; `alive` `[B, 1]`: whether it keeps the old state."""
        decay = self.log_decay[:, 0].exp()
        if alive is not None:
            decay = decay * alive
        state = decay[..., None, None] * state
        if not write:
            return state
        return torch.addcmul(state, self.u[:, 0, ..., None], self.B[:, 0, None, None])

    def read_one(self, state: Tensor) -> Tensor:
        """What a single token reads, `[B, 1, H, P]`."""
        return (state @ self.C[:, 0, None, :, None]).squeeze(-1)[:, None]


class Tiles:
    """Writes cut into tiles, and what each tile adds to the state.

    Attributes:
        size, count: L and n.
        token: `[n, L]`, the indices of the tokens, of which `front` before the first and at least
            `spare` after the last are padding.
        u, B, C: of `Writes`, `[B, n, L, ...]`.
        sums: `[B, n, H, L]`, sums of log-decays from the tile's begin to each token, in float64.
        total: `[B, n, H]`, those over whole tiles.
        start: `[B, n, L]`, where each token's segment begins; None for one segment.
        first: `[B, n]`, the tile in which the segment of each tile's last token begins, or None.
    """

    def __init__(self, writes: Writes, size: int, front: int = 0, spare: int = 0) -> None:
        length = writes.u.shape[1]
        self.size = size
        self.count = cover(front + length + spare, size)
        token = torch.arange(self.count * size, device=writes.u.device) - front
        self.token = token.unflatten(0, (self.count, size))
        back = self.count * size - front - length

        def cut(x: Tensor) -> Tensor:
            padding = (0, 0) * (x.dim() - 2) + (front, back)
            return F.pad(x, padding).unflatten(1, (self.count, size))

        self.u = cut(writes.u)
        self.B = cut(writes.B)
        self.C = cut(writes.C)
        self.sums = segment_sums(cut(writes.log_decay).mT)
        self.total = self.sums[..., -1]
        self.start = self.first = None
        if writes.start is not None:
            self.start = tile_starts(writes.start, self.count, size)
            self.first = self.start[..., -1] // size

    def fade_to_end(self) -> Tensor:
        """Decay of each token's write until the end of its tile, `[B, n, L, H]`."""
        return (self.total[..., None] - self.sums).exp().to(self.u.dtype).mT

    def writes(self, weight: Tensor) -> Tensor:
        """`sum_t weight_t u_t B_t^T` over each tile: `[B, n, L, H]` -> `[B, n, H, P, N]`."""
        written = (self.u * weight[..., None]).flatten(3)
        return (written.mT @ self.B).unflatten(2, self.u.shape[3:])

    def added(self) -> Tensor:
        """What each tile adds to the state at its own end, `[B, n, H, P, N]`."""
        weight = self.fade_to_end()
        if self.start is not None:
            weight = weight * (self.token >= self.start[..., -1:])[..., None]
        return self.writes(weight)

    def before(self, initial: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States before each tile `[B, n, H, P, N]`, and after the last one `[B, H, P, N]`."""
        added = (self.added() if added is None else added).flatten(3)
        before, final = carry(added, self.total, initial.flatten(2), self.first)
        shape = initial.shape[2:]
        return before.unflatten(3, shape), final.unflatten(2, shape)

    def read_written(self, u: Tensor, B: Tensor, sums: Tensor, mask: Tensor) -> Tensor:
        """What tokens of a tile read of writes u `[B, n, S, H, P]` along B `[B, n, S, N]`."""
        decay = decay_between(self.sums, sums, mask[:, :, None], u.dtype)
        weight = (self.C @ B.mT)[:, :, None] * decay
        return (weight @ u.transpose(2, 3)).transpose(2, 3)

    def causal(self) -> Tensor:
        """`[B or 1, n or 1, L, L]`: the token itself and earlier ones of its tile and segment."""
        row = torch.arange(self.size, device=self.u.device)
        mask = (row <= row[:, None])[None, None]
        if self.start is not None:
            mask = mask & (self.token[:, None] >= self.start[..., None])
        return mask


def read(C: Tensor, state: Tensor, exponent: Tensor, alive: Tensor | None) -> Tensor:
    """`exp(exponent_t) state C_t`, where all tokens of a tile read one state.

    C `[B, n, L, N]`, state `[B, n, H, P, N]`, exponent `[B, n, H, L]`, alive `[B, n, L]`: whether
    the state reaches the token (None: all) -> `[B, n, L, H, P]`.
    """
    y = (C @ state.flatten(2, 3).mT).unflatten(3, state.shape[2:4])
    fade = exponent.exp().to(y.dtype).mT
    if alive is not None:
        fade = fade * alive[..., None]
    return y * fade[..., None]


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
    precision in float32 after one very strong decay.
    """
    wide = log_decay.dtype if log_decay.device.type == "mps" else torch.float64
    return running_sum(log_decay.to(wide))


class _PreciseDifference(torch.autograd.Function):
    """`reader_t - source_s` in a narrower dtype, with gradients summed in the inputs' float64.

    The gradient of one token's decay is a small difference of two such sums, which are large.
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
    """`_PreciseDifference` with forward-mode derivatives, which torch.compile can't trace."""

    @staticmethod
    def jvp(ctx: Any, reader: Tensor, source: Tensor, _: None) -> Tensor:
        return (reader[..., None] - source[..., None, :]).to(ctx.dtype)


def decay_between(reader: Tensor, source: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`exp(reader_t - source_s)` where mask allows, else 0: `[..., T, S]`.

    The sums are float64. Their difference is taken in `dtype` without loss, as the difference of
    their leading parts plus that of their remainders. Gradients pass through the remainders alone.
    """
    if dtype == reader.dtype:
        exponent = reader[..., None] - source[..., None, :]
    else:
        reader_lead = reader.detach().to(dtype)
        source_lead = source.detach().to(dtype)
        exponent = reader_lead[..., None] - source_lead[..., None, :]
        forward = not torch.compiler.is_compiling() and forward_mode()
        difference = _PreciseDifferenceForward if forward else _PreciseDifference
        exponent = exponent + difference.apply(reader - reader_lead, source - source_lead, dtype)
    return exponent.masked_fill(~mask, -math.inf).exp()


def carry(
    states: Tensor, log_total: Tensor, initial: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence across tiles, `h_c = exp(log_total_c) * h_{c-1} + states_c`, without a loop.

    There are two levels of about sqrt(n) tiles each (32 in a compiled graph). So time and memory
    stay far below n squared, and no loop depends on the length, which may be dynamic in a graph.

    Args:
        states: what each tile adds, `[B, n, H, K]`.
        log_total: logarithm of each whole tile's decay, `[B, n, H]`.
        initial: state before the first tile, `[B, H, K]`.
        first: `[B, n]`, the first tile whose sum reaches the end of each tile; below 0 if the
            initial state does too; None if all do.

    Returns:
        The states before each tile, `[B, n, H, K]`, and the one after the last, `[B, H, K]`.
    """
    # The initial state becomes a tile before the others.
    states = torch.cat([initial[:, None], states], dim=1)
    log_total = F.pad(log_total, (0, 0, 1, 0))
    first = None if first is None else F.pad(first + 1, (1, 0)).clamp(min=0)
    tiles = states.shape[1]
    # A constant for traced lengths: symbolic roots take the compiler minutes.
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
    # From group to group: the state at the end of all earlier groups.
    ends = inside[..., -1, :]
    total = running_sum(sums[..., -1].mT)
    row = torch.arange(groups, device=states.device)
    alive = (row < row[:, None]) & (
        row >= (F.pad(first[..., -1], (1, 0))[:, :-1] // group)[..., None]
    )
    before = F.pad(total, (1, 0))[..., :-1]
    across = decay_between(before, total, alive[:, None], states.dtype) @ ends.transpose(1, 2)
    # The state before a group decays until each of its tiles, unless a segment begins in between.
    reach = first < index[:, :1]
    fade = sums.exp().to(states.dtype) * reach[:, :, None]
    after = inside + fade[..., None] * across.transpose(1, 2)[..., None, :]
    after = after.transpose(2, 3).flatten(1, 2)[:, :tiles]
    # A copy: as a view, the final state would keep all of them alive.
    return after[:, :-1], after[:, -1].clone()
