"""Selective state space in its chunked (SSD) form."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longctx_layers.ops import availability, reference
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape
from longctx_layers.ops.examples import Draw
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.segments import Segments, clip_tile
from longctx_layers.ops.state_space import cpu
from longctx_layers.ops.state_space.tiles import TILE, SSDInputs, Tiles, Writes, read

LARGEST = 256  # P and N of a state that Triton's kernels hold


def example(draw: Draw, packed: bool = False, states: int = 1, **options: int) -> dict[str, Any]:
    """Arguments of `ssd`, or with two states of `block_ssd`, for self-checks."""
    length = draw.length
    arguments: dict[str, Any] = {
        "dt": draw(2, length, 4).abs() / 8,
        "x": draw(2, length, 4, 64),
        "A": -draw(4).abs(),
        "B": draw(2, length, 32),
        "C": draw(2, length, 32),
        **options,
    }
    if packed:
        initial = tuple(draw(2, 4, 64, 32) for _ in range(states))
        arguments["initial_state"] = initial if states > 1 else initial[0]
        arguments["segments"] = draw.segments()
    return arguments


_operation = Operation(
    "ssd",
    examples={
        "": example,
        "packed": partial(example, packed=True),
        "one token": lambda _: example(Draw(1), packed=True),
    },
    precise=("dt", "A", "initial_state"),
)


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
    """Selective state space: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T` and `y_t = h_t C_t`.

    Args:
        x: inputs `[B, T, H, P]`.
        dt: step sizes `[B, T, H]`, at least 0.
        A: `[H]`, negative: the state decays by `exp(dt A)` per token.
        B, C: write and read directions `[B, T, N]`, shared by the heads.
        initial_state: `[B, H, P, N]` before the first token, float32 at least; None for zero.
        segments: where the state restarts from zero, and where rows end; None for neither.
        backend: see `longctx_layers.explain`.

    Returns:
        y `[B, T, H, P]` in x's dtype, and the final state `[B, H, P, N]`, float32 at least. There
        is no skip connection: add `skip * x` for one.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Dao and Gu, Mamba-2, arXiv 2405.21060.

    >>> import torch
    >>> x, dt, A = torch.randn(1, 10, 2, 8), torch.rand(1, 10, 2), -torch.ones(2)
    >>> B, C = torch.randn(2, 1, 10, 4)
    >>> y, h = ssd(x[:, :7], dt[:, :7], A, B[:, :7], C[:, :7])
    >>> y, h = ssd(x[:, 7:], dt[:, 7:], A, B[:, 7:], C[:, 7:], initial_state=h)
    >>> y.shape, h.shape
    (torch.Size([1, 3, 2, 8]), torch.Size([1, 2, 8, 4]))
    """
    inputs = SSDInputs(x, dt, A, B, C)
    initial_state = check_inputs(inputs, "initial_state", initial_state, segments)
    if x.shape[1] == 0:
        return x, initial_state
    result: tuple[Tensor, Tensor] = _operation(
        inputs, initial_state=initial_state, segments=segments, backend=backend
    )
    return result


def check_inputs(
    inputs: SSDInputs, name: str, state: Tensor | None, segments: Segments | None
) -> Tensor:
    """Raise for arguments that do not fit together; returns the state `name`, zero for None."""
    x, dt, A, B, C = inputs
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


def refuse_triton(inputs: SSDInputs, **_: Any) -> str | None:
    """Why Triton's kernels can't run a call of `ssd` or `block_ssd` on a GPU, or None."""
    x = inputs.x
    largest_n = LARGEST if x.dtype == torch.bfloat16 else LARGEST // 2
    if x.shape[3] > LARGEST or inputs.B.shape[2] > largest_n:
        return f"needs P of at most {LARGEST} and N of at most {largest_n} in {x.dtype}"
    return availability.refuse_triton(x)


@_operation.register("triton", refuse=refuse_triton)
def _triton(
    inputs: SSDInputs, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    from longctx_layers.kernels.ssd import ssd as kernel  # imports Triton

    start = None if segments is None else segments.start
    # In float64, where the product is exact: the gradient of A adds up errors of all tokens.
    dt, log_decay = inputs.steps(torch.float64, segments)
    dt = dt.to(initial_state.dtype)
    y, final = kernel(inputs.x, dt, log_decay, inputs.B, inputs.C, initial_state[None], start)
    return y, final[0]


_operation.register("cpu", refuse=cpu.refuse_ssd)(cpu.ssd)


@_operation.register("torch")
def _torch(
    inputs: SSDInputs, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    writes = Writes(inputs, initial_state.dtype, segments)
    dtype = inputs.x.dtype
    length = inputs.x.shape[1]
    if length == 1:
        alive = None if segments is None else segments.start < 0
        state = writes.step(initial_state, alive)
        return writes.read_one(state).to(dtype), state
    tiles = Tiles(writes, clip_tile(TILE, length))
    before, final = tiles.before(initial_state)
    alive = None if tiles.start is None else tiles.start < tiles.token[:, :1]
    y = read(tiles.C, before, tiles.sums, alive)
    y = y + tiles.read_written(tiles.u, tiles.B, tiles.sums, tiles.causal())
    return y.flatten(1, 2)[:, :length].to(dtype), final


_operation.register("reference")(reference.ssd)
