"""Gradients of the selective state space.

Given the states before each tile and the gradients of the states after each tile (both from
`ssd_forward._states`), all tiles are independent. `_back_to_writes` computes the gradients of x and
dt, `_back_to_directions` those of B and C, and both a part of those of the decays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_three
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.ssd_configs import CONFIGS
from longctx_layers.kernels.ssd_forward import blocks, how_to_multiply, states_before
from longctx_layers.kernels.ssd_tile import (
    between,
    decay_sums,
    edges,
    entering,
    exact,
    leaving,
    load_states,
    load_sums,
    load_tokens,
    passing,
    place_of_program,
    reads_late,
    rounded,
    store_tokens,
    strided,
)
from longctx_layers.kernels.target import pick

check_import_name(__name__)

HEADS = 4  # heads over which a program sums the gradients of B and C


@triton.jit
def _back_to_writes(
    X, DT, SUMS, B, C, START, UNTIL, DY, DSTATES, DX, DDT, DDECAY,
    x_b, x_t, x_h, b_b, b_t, c_b, c_t, until_b, T, H, tiles,
    P: tl.constexpr, N: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, PENDING: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of x and dt in a tile, and of the decays between writes and their reads."""
    b, batch, h, first, tile = place_of_program(H, tiles, P, ROWS)
    size, parts = tl.cast(H, tl.int64) * P * N, tl.cdiv(P, ROWS)
    t0, i = tile * TOKENS, tl.arange(0, TOKENS)
    long_t0, inside = t0.to(tl.int64), t0 + i < T
    at, until_at = b * T + t0, b * until_b + t0
    last_start, last_until, next_until = edges(
        START, UNTIL, b * T, b * until_b, t0, T, TOKENS, PACKED, PENDING
    )
    lead, rest, total, total_rest = load_sums(
        SUMS + (b * H + h) * tiles * TOKENS + t0, batch * H * tiles * TOKENS, TOKENS
    )
    dt = tl.load(DT + at * H + h + i * H, mask=inside, other=0.0)
    x = load_tokens(X, b * x_b + long_t0 * x_t + h * x_h, x_t, inside, first, P, ROWS)
    b_tile = load_tokens(B, b * b_b + long_t0 * b_t, b_t, inside, 0, N, COLUMNS)

    du = tl.zeros((TOKENS, ROWS), dt.dtype)
    ddt, ddecay = tl.zeros_like(dt), tl.zeros_like(dt)
    before = i[None, :] < i[:, None]

    # Through reads by tokens of the same tile.
    if last_until >= t0:
        dy = load_tokens(DY, (at * H + h) * P, H * P, inside, first, P, ROWS)
        c_tile = load_tokens(C, b * c_b + long_t0 * c_t, c_t, inside, 0, N, COLUMNS)
        weight = exact(c_tile, tl.trans(b_tile), DOT)
        weight *= between(lead, rest, START, UNTIL, at, until_at, t0, inside, PACKED, PENDING)
        du += rounded(tl.trans(weight), dy, DOT)
        weight *= exact(dy, tl.trans(x), DOT)
        ddt += tl.sum(weight, 0)
        since = (i[None, :] >= i[:, None]).to(x.dtype)
        weight = exact(since, weight * dt[None, :], DOT)  # not as a difference of large sums
        ddecay += tl.sum(tl.where(before, weight, 0.0), 1)

    # Through the states after the tile.
    here = DSTATES + (b * tiles + tile) * size + h * P * N
    other = batch * tiles * size
    readable, pending = load_states(here, other, first, P, N, ROWS, COLUMNS, PENDING)
    left = exact(b_tile, tl.trans(readable), DOT)
    if next_until < t0 + TOKENS:
        late = exact(b_tile, tl.trans(pending), DOT)
        left = tl.where((t0 + i < next_until)[:, None], left, late)
    left *= leaving(lead, rest, total, total_rest, last_start, t0, PACKED)[:, None]
    du += left
    left_dt = tl.sum(x * left, 1)
    ddt += left_dt
    ddecay += tl.sum(tl.where(before, (left_dt * dt)[None, :], 0.0), 1)
    store_tokens(DX, (at * H + h) * P, H * P, du * dt[:, None], inside, first, P, ROWS)
    out = ((at + i) * H + h) * parts + first // ROWS
    tl.store(DDT + out, ddt, mask=inside)
    tl.store(DDECAY + out, ddecay, mask=inside)


@triton.jit
def _back_to_directions(
    X, DT, SUMS, B, C, START, UNTIL, DY, STATES, DSTATES, DB, DC, DDECAY,
    x_b, x_t, x_h, b_b, b_t, c_b, c_t, until_b, T, H, tiles, groups,
    P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, PENDING: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C in a tile, summed over some heads; and of the decays between the states
    before the tile and their reads, or the states after the tile.
    """
    PRECISE: tl.constexpr = STATES.dtype.element_ty
    parts: tl.constexpr = (P + ROWS - 1) // ROWS
    group, tile, b = index_of_three(groups, tiles)
    batch = (tl.num_programs(0) // (groups * tiles)).to(tl.int64)
    size = tl.cast(H, tl.int64) * P * N
    t0, i = tile * TOKENS, tl.arange(0, TOKENS)
    long_t0, inside = t0.to(tl.int64), t0 + i < T
    at, until_at = b * T + t0, b * until_b + t0
    last_start, last_until, next_until = edges(
        START, UNTIL, b * T, b * until_b, t0, T, TOKENS, PACKED, PENDING
    )
    b_tile = load_tokens(B, b * b_b + long_t0 * b_t, b_t, inside, 0, N, COLUMNS)
    c_tile = load_tokens(C, b * c_b + long_t0 * c_t, c_t, inside, 0, N, COLUMNS)
    db = tl.zeros((TOKENS, COLUMNS), PRECISE)
    dc = tl.zeros((TOKENS, COLUMNS), PRECISE)
    for cut in tl.range(group * HEADS * parts, tl.minimum((group + 1) * HEADS, H) * parts):
        h, first = tl.cast(cut // parts, tl.int64), cut % parts * ROWS
        lead, rest, total, total_rest = load_sums(
            SUMS + (b * H + h) * tiles * TOKENS + t0, batch * H * tiles * TOKENS, TOKENS
        )
        dt = tl.load(DT + at * H + h + i * H, mask=inside, other=0.0)
        x = load_tokens(X, b * x_b + long_t0 * x_t + h * x_h, x_t, inside, first, P, ROWS)
        dy = load_tokens(DY, (at * H + h) * P, H * P, inside, first, P, ROWS)
        state, other = (b * tiles + tile) * size + h * P * N, batch * tiles * size

        if last_until >= t0:
            weight = exact(dy, tl.trans(x), DOT) * dt[None, :]
            weight *= between(lead, rest, START, UNTIL, at, until_at, t0, inside, PACKED, PENDING)
            dc += rounded(weight, b_tile, DOT)
            db += rounded(tl.trans(weight), c_tile, DOT)

        readable, pending = load_states(STATES + state, other, first, P, N, ROWS, COLUMNS, PENDING)
        fade = entering(lead, START, at, t0, inside, PACKED)
        read = exact(dy, readable, DOT) * fade[:, None]
        if PENDING:  # noqa: SIM102 # the first condition is a constant
            if last_until >= t0:
                fade = tl.where(reads_late(UNTIL, until_at, t0, inside), fade, 0.0)
                read += exact(dy, pending, DOT) * fade[:, None]
        dc += read
        ddecay = tl.cumsum(tl.sum(read * c_tile, 1), 0, reverse=True)

        d_readable, d_pending = load_states(
            DSTATES + state, other, first, P, N, ROWS, COLUMNS, PENDING
        )
        passed = tl.sum(d_readable * readable)
        written = rounded(x, d_readable, DOT)
        if PENDING:
            passed += tl.sum(tl.where(next_until >= t0, d_readable, d_pending) * pending)
        if next_until < t0 + TOKENS:
            late = rounded(x, d_pending, DOT)
            written = tl.where((t0 + i < next_until)[:, None], written, late)
        fade = leaving(lead, rest, total, total_rest, last_start, t0, PACKED)
        db += written * (fade * dt)[:, None]
        ddecay += passing(total, last_start, t0, PACKED) * passed
        tl.store(DDECAY + ((at + i) * H + h) * parts + cut % parts, ddecay, mask=inside)
    out = (at * groups + group) * N
    store_tokens(DB, out, groups * N, db, inside, 0, N, COLUMNS)
    store_tokens(DC, out, groups * N, dc, inside, 0, N, COLUMNS)


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    start: Tensor | None = None,
    until: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, log_decay, B, C and the initial state; see `ssd_forward.forward`."""
    x, B, C, dy = strided(x), strided(B), strided(C), dy.contiguous()
    dt, log_decay, state = dt.contiguous(), log_decay.contiguous(), state.contiguous()
    start, until = (None if z is None else z.contiguous() for z in (start, until))
    (batch, length, heads, dim), directions = x.shape, B.shape[2]
    tiles = pick(CONFIGS).of(x.dtype, directions)
    sums, dstate = decay_sums(log_decay, state.dtype, tiles.tokens), torch.empty_like(state)
    states = states_before(x, dt, sums, B, start, until, state, tiles, every=True)
    dstates = states_before(
        dy,
        None,
        sums,
        C,
        start,
        until,
        dfinal.contiguous(),
        tiles,
        reverse=True,
        every=True,
        after=dstate,
    )
    rows, columns = blocks(tiles, state)
    parts, count = triton.cdiv(dim, rows), triton.cdiv(length, tiles.tokens)
    groups = triton.cdiv(heads, HEADS)
    sizes = (dim, directions), (tiles.tokens, rows, columns)
    flags = start is not None, until is not None, how_to_multiply(x.dtype)
    strides = *x.stride()[:3], *B.stride()[:2], *C.stride()[:2]
    until_b = 0 if until is None or until.shape[0] == 1 else length + 1
    dx, ddt = x.new_empty(x.shape), dt.new_empty(batch, length, heads, parts)
    ddecay = dt.new_empty(2, batch, length, heads, parts)
    _back_to_writes[grid(heads * parts, count, batch)](
        x, dt, sums, B, C, start, until, dy, dstates, dx, ddt, ddecay[0],
        *strides, until_b, length, heads, count, *sizes[0], *sizes[1], *flags,
        **tiles.launch(reads=True),
    )  # fmt: skip
    db, dc = (dt.new_empty(batch, length, groups, directions) for _ in range(2))
    _back_to_directions[grid(groups, count, batch)](
        x, dt, sums, B, C, start, until, dy, states, dstates, db, dc, ddecay[1],
        *strides, until_b, length, heads, count, groups, *sizes[0], HEADS, *sizes[1], *flags,
        **tiles.launch(),
    )  # fmt: skip
    db, dc = (z.sum(2).to(B.dtype) for z in (db, dc))
    return dx, ddt.sum(3), ddecay.sum((0, 4), dtype=log_decay.dtype), db, dc, dstate
