"""Forward pass of the selective state space.

Time is divided into tiles, and consecutive tiles form spans. `_states` computes what each span adds
to the state, `_pass_on` carries the states across spans, and `_scan` processes the spans again from
these states and computes the outputs. So x is read twice, and all spans run in parallel. `ssd_tile`
has the work on one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.ssd_configs import CONFIGS, Tiles
from longctx_layers.kernels.ssd_tile import (
    LOG2E,
    advance,
    advance_back,
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
    store_states,
    store_tokens,
    strided,
)
from longctx_layers.kernels.target import dot_precision, pick, target

check_import_name(__name__)


CARRIED = 512  # elements of a state that a program of `_pass_on` carries
STEPPED = 1024  # elements of a state that a program of `_step` updates


@triton.jit
def _states(
    X, DT, SUMS, B, START, UNTIL, ENTER, OUT, THROUGH, AFTER,
    x_b, x_t, x_h, b_b, b_t, until_b, T, H, tiles, spans,
    P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, EVERY: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, PENDING: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The state after a span that begins with a zero state, without computing outputs.

    With EVERY: the states before each tile, from the state before the span, and the one after all
    spans (AFTER). In reverse, all states are gradients, X is dy, and B is C.
    """
    PRECISE: tl.constexpr = OUT.dtype.element_ty
    b, batch, h, first, span = place_of_program(H, spans, P, ROWS)
    size, state = tl.cast(H, tl.int64) * P * N, h * P * N
    readable = tl.zeros((ROWS, COLUMNS), PRECISE)
    pending = readable
    if EVERY:
        here = ENTER + (b * spans + span) * size + state
        other = batch * spans * size
        readable, pending = load_states(here, other, first, P, N, ROWS, COLUMNS, PENDING)
    all_through = tl.full((), 1.0, PRECISE)
    count = tl.minimum(SPAN, tiles - span * SPAN)
    for step in tl.range(0, count):
        tile = span * SPAN + (count - 1 - step if REVERSE else step)
        if EVERY:
            here = OUT + (b * tiles + tile) * size + state
            other = batch * tiles * size
            store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)
        t0 = tile * TOKENS
        long_t0, inside = t0.to(tl.int64), t0 + tl.arange(0, TOKENS) < T
        at, until_at = b * T + t0, b * until_b + t0
        last_start, last_until, next_until = edges(
            START, UNTIL, b * T, b * until_b, t0, T, TOKENS, PACKED, PENDING
        )
        lead, rest, total, total_rest = load_sums(
            SUMS + (b * H + h) * tiles * TOKENS + t0, batch * H * tiles * TOKENS, TOKENS
        )
        through = passing(total, last_start, t0, PACKED)
        all_through *= through
        x = load_tokens(X, b * x_b + long_t0 * x_t + h * x_h, x_t, inside, first, P, ROWS)
        directions = load_tokens(B, b * b_b + long_t0 * b_t, b_t, inside, 0, N, COLUMNS)
        if REVERSE:
            weight = entering(lead, START, at, t0, inside, PACKED)
            readable, pending = advance_back(
                x,
                directions,
                weight,
                readable,
                pending,
                through,
                UNTIL,
                until_at,
                t0,
                inside,
                last_until,
                next_until,
                DOT,
                PENDING,
            )
        else:
            dt = tl.load(DT + at * H + h + tl.arange(0, TOKENS) * H, mask=inside, other=0.0)
            weight = dt * leaving(lead, rest, total, total_rest, last_start, t0, PACKED)
            readable, pending = advance(
                x, directions, weight, readable, pending, through, t0, next_until, DOT, PENDING
            )
    if not EVERY:
        here = OUT + (b * spans + span) * size + state
        other = batch * spans * size
        store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)
        tl.store(THROUGH + (b * spans + span) * H + h, all_through, mask=first == 0)
    elif AFTER is not None:  # noqa: SIM102 # the first condition is a constant
        if span == (0 if REVERSE else spans - 1):
            here = AFTER + b * size + state
            other = batch * size
            store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)


@triton.jit
def _pass_on(
    STATES,
    THROUGH,
    UNTIL,
    ENTER,
    until_b,
    T,
    H,
    spans,
    tokens,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PENDING: tl.constexpr,
):
    """In place: the states after each span become those before it (in reverse: the opposite)."""
    b, batch, h, first, _ = place_of_program(H, 1, P, ROWS)
    size, state = tl.cast(H, tl.int64) * P * N, h * P * N
    readable, pending = load_states(
        ENTER + b * size + state, batch * size, first, P, N, ROWS, COLUMNS, PENDING
    )
    for step in tl.range(0, spans, loop_unroll_factor=4):
        span = spans - 1 - step if REVERSE else step
        here, other = STATES + (b * spans + span) * size + state, batch * spans * size
        through = tl.load(THROUGH + (b * spans + span) * H + h)
        added, added_pending = load_states(here, other, first, P, N, ROWS, COLUMNS, PENDING)
        store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)
        if PENDING:
            t0 = span * tokens
            moves = tl.load(UNTIL + b * until_b + tl.minimum(t0 + tokens, T)) >= t0
            if REVERSE:
                pending = through * tl.where(moves, readable, pending) + added_pending
                readable = through * readable + added
            else:
                readable = through * (readable + tl.where(moves, pending, 0.0)) + added
                pending = through * tl.where(moves, 0.0, pending) + added_pending
        else:
            readable = through * readable + added


@triton.jit
def _scan(
    X, DT, SUMS, B, C, START, UNTIL, ENTER, Y, FINAL,
    x_b, x_t, x_h, b_b, b_t, c_b, c_t, until_b, T, H, tiles, spans,
    P: tl.constexpr, N: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, PENDING: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The outputs of a span, from the state before it; the last span writes the final state."""
    b, batch, h, first, span = place_of_program(H, spans, P, ROWS)
    size, state = tl.cast(H, tl.int64) * P * N, h * P * N
    here = ENTER + (b * spans + span) * size + state
    other = batch * spans * size
    readable, pending = load_states(here, other, first, P, N, ROWS, COLUMNS, PENDING)
    for tile in tl.range(span * SPAN, tl.minimum((span + 1) * SPAN, tiles)):
        t0 = tile * TOKENS
        long_t0, inside = t0.to(tl.int64), t0 + tl.arange(0, TOKENS) < T
        at, until_at = b * T + t0, b * until_b + t0
        last_start, last_until, next_until = edges(
            START, UNTIL, b * T, b * until_b, t0, T, TOKENS, PACKED, PENDING
        )
        lead, rest, total, total_rest = load_sums(
            SUMS + (b * H + h) * tiles * TOKENS + t0, batch * H * tiles * TOKENS, TOKENS
        )
        dt = tl.load(DT + at * H + h + tl.arange(0, TOKENS) * H, mask=inside, other=0.0)
        x = load_tokens(X, b * x_b + long_t0 * x_t + h * x_h, x_t, inside, first, P, ROWS)
        b_tile = load_tokens(B, b * b_b + long_t0 * b_t, b_t, inside, 0, N, COLUMNS)
        c_tile = load_tokens(C, b * c_b + long_t0 * c_t, c_t, inside, 0, N, COLUMNS)
        fade = entering(lead, START, at, t0, inside, PACKED)
        y = rounded(c_tile, tl.trans(readable), DOT) * fade[:, None]
        if last_until >= t0:
            weight = exact(c_tile, tl.trans(b_tile), DOT) * dt[None, :]
            weight *= between(lead, rest, START, UNTIL, at, until_at, t0, inside, PACKED, PENDING)
            y += rounded(weight, x, DOT)
            if PENDING:
                fade = tl.where(reads_late(UNTIL, until_at, t0, inside), fade, 0.0)
                y += rounded(c_tile, tl.trans(pending), DOT) * fade[:, None]
        store_tokens(Y, (at * H + h) * P, H * P, y, inside, first, P, ROWS)
        weight = dt * leaving(lead, rest, total, total_rest, last_start, t0, PACKED)
        through = passing(total, last_start, t0, PACKED)
        readable, pending = advance(
            x, b_tile, weight, readable, pending, through, t0, next_until, DOT, PENDING
        )
    if span == spans - 1:
        here = FINAL + b * size + state
        other = batch * size
        store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)


@triton.jit
def _step(
    X, DT, DECAY, B, C, START, UNTIL, STATE, Y, FINAL, x_b, x_h, b_b, c_b, until_b, H,
    P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """One token: its output, and the state after it."""
    PRECISE: tl.constexpr = FINAL.dtype.element_ty
    b, batch, h, first, _ = place_of_program(H, 1, P, ROWS)
    size, state = tl.cast(H, tl.int64) * P * N, h * P * N
    readable, pending = load_states(
        STATE + b * size + state, batch * size, first, P, N, ROWS, COLUMNS, PENDING
    )
    p, n = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(X + b * x_b + h * x_h + p, mask=p < P, other=0.0).to(PRECISE)
    b_one = tl.load(B + b * b_b + n, mask=n < N, other=0.0).to(PRECISE)
    c_one = tl.load(C + b * c_b + n, mask=n < N, other=0.0).to(PRECISE)
    through = tl.exp2((tl.load(DECAY + b * H + h).to(tl.float64) * LOG2E).to(PRECISE))
    if PACKED:
        through = tl.where(tl.load(START + b) < 0, through, 0.0)
    written = (tl.load(DT + b * H + h) * x)[:, None] * b_one[None, :]
    if PENDING:
        moves = tl.load(UNTIL + b * until_b) >= 0
        readable = through * (readable + tl.where(moves, pending, 0.0))
        pending = through * tl.where(moves, 0.0, pending) + written
        read = readable
        moves = tl.load(UNTIL + b * until_b + 1) > 0
        readable += tl.where(moves, pending, 0.0)
        pending = tl.where(moves, 0.0, pending)
    else:
        readable = through * readable + written
        read = readable
    y = tl.sum(read * c_one[None, :], 1)
    tl.store(Y + (b * H + h) * P + p, y.to(Y.dtype.element_ty), mask=p < P)
    here = FINAL + b * size + state
    other = batch * size
    store_states(here, other, first, readable, pending, P, N, ROWS, COLUMNS, PENDING)


def blocks(tiles: Tiles, state: Tensor) -> tuple[int, int]:
    """Rows and columns of the part of a state `[1 or 2, ..., P, N]` that a program keeps."""
    states, (dim, directions) = state.shape[0], state.shape[-2:]
    rows, columns = (max(16, triton.next_power_of_2(n)) for n in (dim, directions))
    return min(rows, max(16, tiles.elements // (states * columns))), columns


def how_to_multiply(dtype: torch.dtype) -> str:
    """The precision of float32 products that inputs of a dtype need."""
    # Products of a float16 and a state: TF32 holds every float16, and has the range of float32.
    half = dtype == torch.float16 and not target().startswith("gfx")
    return "tf32x3" if half else dot_precision(dtype)


def states_before(
    x: Tensor,
    dt: Tensor | None,
    sums: Tensor,
    B: Tensor,
    start: Tensor | None,
    until: Tensor | None,
    enter: Tensor,
    tiles: Tiles,
    *,
    reverse: bool = False,
    every: bool = False,
    after: Tensor | None = None,
) -> Tensor:
    """The states before each span `[1 or 2, B, spans, H, P, N]`; with `every`, before each tile.

    Args:
        x, dt, B, start, until: see `forward`; in reverse `dy, None, C, start, until`.
        sums: of log-decays within tiles.
        enter: the states before the first span; in reverse, after the last one.
        after: is filled with the states after all spans; only with `every`.
    """
    (batch, length, heads, dim), directions = x.shape, B.shape[2]
    rows, columns = blocks(tiles, enter)
    count = triton.cdiv(length, tiles.tokens)
    spans = triton.cdiv(count, tiles.span)
    until_b = 0 if until is None or until.shape[0] == 1 else length + 1

    def walk(enter: Tensor | None, out: Tensor, through: Tensor | None, every: bool) -> None:
        _states[grid(heads * triton.cdiv(dim, rows), spans, batch)](
            x, dt, sums, B, start, until, enter, out, through, after if every else None,
            *x.stride()[:3], *B.stride()[:2], until_b, length, heads, count, spans,
            dim, directions, reverse, every, tiles.tokens, tiles.span, rows, columns,
            start is not None, until is not None, how_to_multiply(x.dtype), **tiles.launch(),
        )  # fmt: skip

    def new(slots: int) -> Tensor:
        return enter.new_empty(*enter.shape[:2], slots, *enter.shape[2:])

    states = enter
    if spans > 1:
        states, through = new(spans), enter.new_empty(batch, spans, heads)
        walk(None, states, through, False)
        few = max(1, CARRIED // columns)
        _pass_on[grid(heads * triton.cdiv(dim, few), batch)](
            states,
            through,
            until,
            enter,
            until_b,
            length,
            heads,
            spans,
            tiles.tokens * tiles.span,
            dim,
            directions,
            reverse,
            few,
            columns,
            until is not None,
            num_warps=4,
        )
    if not every:
        return states
    enter, states = states, new(count)
    walk(enter, states, None, True)
    return states


def forward(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    start: Tensor | None = None,
    until: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y `[B, T, H, P]` in x's dtype, and the final state, in the form of the initial one.

    Args:
        x: `[B, T, H, P]`, T at least 1.
        dt: `[B, T, H]` in the state's dtype; 0 at padding.
        log_decay: `[B, T, H]`, best in float64; 0 at padding.
        B, C: `[B, T, N]` in x's dtype.
        state: `[1, B, H, P, N]`; with `until` `[2, B, H, P, N]`: readable, and pending.
        start: `[B, T]`, where each token's segment starts; None for one segment without end.
        until: `[1 or B, T + 1]`: each token, and one after the last, reads what was written before
            the token `until`. At least its segment's start, and never decreasing. None: each token
            reads everything up to and including its own write.
    """
    x, B, C = strided(x), strided(B), strided(C)
    dt, log_decay, state = dt.contiguous(), log_decay.contiguous(), state.contiguous()
    start, until = (None if z is None else z.contiguous() for z in (start, until))
    (batch, length, heads, dim), directions = x.shape, B.shape[2]
    y, final = x.new_empty(x.shape), torch.empty_like(state)
    packed, pending = start is not None, until is not None
    until_b = 0 if until is None or until.shape[0] == 1 else length + 1
    if length == 1:
        columns = triton.next_power_of_2(directions)
        rows = max(1, STEPPED // columns)
        _step[grid(heads * triton.cdiv(dim, rows), batch)](
            x, dt, log_decay, B, C, start, until, state, y, final,
            x.stride(0), x.stride(2), B.stride(0), C.stride(0), until_b, heads,
            dim, directions, rows, columns, packed, pending, num_warps=4,
        )  # fmt: skip
        return y, final
    tiles = pick(CONFIGS).of(x.dtype, directions)
    rows, columns = blocks(tiles, state)
    sums = decay_sums(log_decay, state.dtype, tiles.tokens)
    enter = states_before(x, dt, sums, B, start, until, state, tiles)
    count = triton.cdiv(length, tiles.tokens)
    spans = triton.cdiv(count, tiles.span)
    _scan[grid(heads * triton.cdiv(dim, rows), spans, batch)](
        x, dt, sums, B, C, start, until, enter, y, final,
        *x.stride()[:3], *B.stride()[:2], *C.stride()[:2], until_b, length, heads, count, spans,
        dim, directions, tiles.tokens, tiles.span, rows, columns, packed, pending,
        how_to_multiply(x.dtype), **tiles.launch(reads=True),
    )  # fmt: skip
    return y, final
