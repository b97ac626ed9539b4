"""Selective state space in its chunked (SSD) form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import cpu_support, reference, triton_support
from longctx_layers.ops.backends import Operation
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape
from longctx_layers.ops.segments import Segments, cover, shortened
from longctx_layers.ops.state_space.cpu import scan_tiles
from longctx_layers.ops.state_space.diagonal import (
    MIN_LOG_DECAY,
    carry,
    decay_between,
    segment_sums,
    tile_starts,
)

TILE = 64
LARGEST = 256  # P and N of a state that Triton's kernels hold

_ssd = Operation("ssd")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state space: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, read as `y_t = h_t C_t`.

    Args:
        x: inputs `[B, T, H, P]`.
        dt: step sizes `[B, T, H]`, at least 0.
        A: `[H]`, negative: the state decays by `exp(dt A)` per token.
        B, C: write and read directions `[B, T, N]`, shared by the heads.
        initial_state: `[B, H, P, N]` before the first token, float32 at least; None for zero.
        segments: where the state restarts from zero, and where rows end; None for neither.
        backend: see `longctx_layers.explain`.

    Returns:
        y `[B, T, H, P]` in x's dtype, and the final state `[B, H, P, N]`, float32 at least. The
        skip connection is the caller's: add `skip * x`.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Dao and Gu, Mamba-2, arXiv 2405.21060.
    """
    initial_state = check_inputs(x, dt, A, B, C, "initial_state", initial_state, segments)
    if x.shape[1] == 0:
        return x, initial_state
    result: tuple[Tensor, Tensor] = _ssd(
        x, dt, A, B, C, initial_state=initial_state, segments=segments, backend=backend
    )
    return result


def check_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    name: str,
    state: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """Raise for arguments that do not fit together; returns the state, zero for None."""
    expect_float("x", x, "[B, T, H, P]")
    if x.dim() != 4:
        raise ValueError(f"x: expected [B, T, H, P], got a tensor of shape {list(x.shape)}")
    batch, length, heads, dim = x.shape
    expect_shape("dt", dt, (batch, length, heads), "[B, T, H]")
    expect_shape("A", A, (heads,), "[H]")
    expect_shape("B", B, (batch, length, None), "[B, T, N]")
    expect_shape("C", C, tuple(B.shape), "[B, T, N], as B")
    expect_dtype("B", B, x.dtype)
    expect_dtype("C", C, x.dtype)
    if segments is not None:
        expect_shape("segments.start", segments.start, (batch, length), "[B, T]")
        expect_shape("segments.length", segments.length, (batch,), "[B]")
    precise = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return x.new_zeros(batch, heads, dim, B.shape[2], dtype=precise)
    expect_shape(name, state, (batch, heads, dim, B.shape[2]), "[B, H, P, N]")
    expect_dtype(name, state, precise)
    return state


def steps(
    dt: Tensor, A: Tensor, precise: torch.dtype, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """Step sizes, and the log-decays they make in the same dtype; pads take no step."""
    if segments is not None:
        dt = torch.where(segments.real()[..., None], dt, 0)
    return dt.to(precise), (dt.to(precise) * A.to(precise)).clamp(min=MIN_LOG_DECAY)


class Inputs:
    """Inputs in the state's precision; pads neither write nor decay."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        precise: torch.dtype,
        segments: Segments | None,
    ) -> None:
        dt, self.log_decay = steps(dt, A, precise, segments)
        self.u = x.to(precise) * dt[..., None]
        self.B, self.C = B.to(precise), C.to(precise)
        self.start = None if segments is None else segments.start

    def tile(self, size: int, front: int = 0, spare: int = 0) -> Tiles:
        return Tiles(self, size, front, spare)


class Tiles:
    """The same, cut into n tiles of L tokens, with what each tile adds to the state.

    `front` padding tokens stand before the first, and at least `spare` behind the last.
    """

    def __init__(self, inputs: Inputs, size: int, front: int, spare: int) -> None:
        length = inputs.u.shape[1]
        self.size, self.count = size, cover(front + length + spare, size)
        self.token = torch.arange(self.count * size, device=inputs.u.device) - front
        self.token = self.token.unflatten(0, (self.count, size))
        back = self.count * size - front - length

        def cut(x: Tensor) -> Tensor:
            padding = (0, 0) * (x.dim() - 2) + (front, back)
            return F.pad(x, padding).unflatten(1, (self.count, size))

        self.u, self.B, self.C = cut(inputs.u), cut(inputs.B), cut(inputs.C)
        self.sums = segment_sums(cut(inputs.log_decay).mT)  # [B, n, H, L]
        self.total = self.sums[..., -1]  # [B, n, H]
        self.start = self.first = None
        if inputs.start is not None:
            self.start = tile_starts(inputs.start, self.count, size)
            self.first = self.start[..., -1] // size

    def fade_to_end(self) -> Tensor:
        """Decay of each token's write up to the end of its tile, `[B, n, L, H]`."""
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
        """States before each tile `[B, n, H, P, N]`, and behind the last one `[B, H, P, N]`."""
        added = (self.added() if added is None else added).flatten(3)
        before, final = carry(added, self.total, initial.flatten(2), self.first)
        shape = initial.shape[2:]
        return before.unflatten(3, shape), final.unflatten(2, shape)

    def read_written(self, u: Tensor, B: Tensor, sums: Tensor, mask: Tensor) -> Tensor:
        """Tokens of a tile read single writes: of u `[B, n, S, H, P]`, along B `[B, n, S, N]`."""
        decay = decay_between(self.sums, sums, mask[:, :, None], u.dtype)
        weight = (self.C @ B.mT)[:, :, None] * decay
        return (weight @ u.transpose(2, 3)).transpose(2, 3)

    def causal(self) -> Tensor:
        """`[B or 1, n or 1, L, L]`: own or earlier tokens of the tile and of the segment."""
        row = torch.arange(self.size, device=self.u.device)
        mask = (row <= row[:, None])[None, None]
        if self.start is not None:
            mask = mask & (self.token[:, None] >= self.start[..., None])
        return mask


def read(C: Tensor, state: Tensor, exponent: Tensor, alive: Tensor | None) -> Tensor:
    """`exp(exponent_t) state C_t` from one state a tile.

    `[B, n, L, N]`, `[B, n, H, P, N]`, `[B, n, H, L]` and `[B, n, L]` -> `[B, n, L, H, P]`.
    """
    y = (C @ state.flatten(2, 3).mT).unflatten(3, state.shape[2:4])
    fade = exponent.exp().to(y.dtype).mT
    if alive is not None:
        fade = fade * alive[..., None]
    return y * fade[..., None]


def refuse_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **_: Any) -> str | None:
    """Why Triton's kernels can't run a call of `ssd` or `block_ssd`, or None."""
    most = LARGEST if x.dtype == torch.bfloat16 else LARGEST // 2
    if x.shape[3] > LARGEST or B.shape[2] > most:
        return f"needs P of at most {LARGEST} and N of at most {most} in {x.dtype}"
    return triton_support.refuse(x)


@_ssd.register("triton", refuse=refuse_triton)
def _ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    from longctx_layers.kernels.ssd import ssd as kernel  # imports Triton

    start = None if segments is None else segments.start
    # In float64, where the product is exact: the gradient of A adds up errors of all tokens.
    dt, log_decay = steps(dt, A, torch.float64, segments)
    y, final = kernel(x, dt.to(initial_state.dtype), log_decay, B, C, initial_state[None], start)
    return y, final[0]


def refuse_cpu(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the CPU path can't run a call of `ssd`, or None."""
    if (reason := cpu_support.refuse(x)) is not None:
        return reason
    if x.shape[1] == 1:
        return "takes no single token, which has no tiles"
    return None


@_ssd.register("cpu", refuse=refuse_cpu)
def _ssd_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    inputs = x, *steps(dt, A, initial_state.dtype, segments), B, C, initial_state
    y, before, added, fade = scan_tiles(*inputs, tile=TILE, within=True, segments=segments)
    return y, fade * before + added


@_ssd.register("torch")
def _ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    inputs = Inputs(x, dt, A, B, C, initial_state.dtype, segments)
    length = x.shape[1]
    if length == 1:
        alive = None if segments is None else (segments.start < 0)
        state = step(inputs, initial_state, alive)
        return read_one(inputs, state).to(x.dtype), state
    tiles = inputs.tile(shortened(TILE, length))
    before, final = tiles.before(initial_state)
    alive = None if tiles.start is None else tiles.start < tiles.token[:, :1]
    y = read(tiles.C, before, tiles.sums, alive)
    y = y + tiles.read_written(tiles.u, tiles.B, tiles.sums, tiles.causal())
    return y.flatten(1, 2)[:, :length].to(x.dtype), final


def step(inputs: Inputs, state: Tensor, alive: Tensor | None, write: bool = True) -> Tensor:
    """The state after one token; `alive` `[B, 1]`: whether the old one reaches it."""
    decay = inputs.log_decay[:, 0].exp()
    if alive is not None:
        decay = decay * alive
    state = decay[..., None, None] * state
    if not write:
        return state
    return torch.addcmul(state, inputs.u[:, 0, ..., None], inputs.B[:, 0, None, None])


def read_one(inputs: Inputs, state: Tensor) -> Tensor:
    """What the one token reads, `[B, 1, H, P]`."""
    return (state @ inputs.C[:, 0, None, :, None]).squeeze(-1)[:, None]


_ssd.register("reference")(reference.ssd)
