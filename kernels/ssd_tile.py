"""The functions of which all kernels of the selective state space consist: the work on one tile.

A tile has L tokens. With S the cumulative sums of log-decays since the beginning of the tile, token
t reads what token s wrote with the factor `exp(S_t - S_s)`, so that everything is a product of
matrices. `block_ssd` has two states: a readable one, and one that is pending until its chunk ends.
There, token t reads only what was written before `until[t]`, and the pending state is added to the
readable one in the tile in which a chunk begins, or in the tile right before it.

`row` and `until_row` are the offsets of a row in START and UNTIL, `at` and `until_at` those of a
tile (`at` in every tensor `[B, T]`). `t0` is the index of the tile's first token in its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_three
from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exact(a, b, DOT: tl.constexpr):
    """`a @ b` with the precision of float32; one of the two may be wider than the other."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=DOT)
    elif b.dtype == tl.bfloat16:  # three significands of 8 bits hold one of 24
        part = a.to(tl.bfloat16)
        product = tl.dot(part, b)
        a -= part.to(a.dtype)
        part = a.to(tl.bfloat16)
        product = tl.dot(part, b, product)
        a -= part.to(a.dtype)
        return tl.dot(a.to(tl.bfloat16), b, product)
    elif a.dtype == tl.bfloat16:
        part = b.to(tl.bfloat16)
        product = tl.dot(a, part)
        b -= part.to(b.dtype)
        part = b.to(tl.bfloat16)
        product = tl.dot(a, part, product)
        b -= part.to(b.dtype)
        return tl.dot(a, b.to(tl.bfloat16), product)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=DOT)


@triton.jit
def rounded(a, b, DOT: tl.constexpr):
    """`a @ b` with the precision of the narrower one, for results that are rounded to it anyway."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=DOT)
    elif b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b)
    elif a.dtype == tl.bfloat16:
        return tl.dot(a, b.to(tl.bfloat16))
    else:  # a state may exceed the range of float16; TF32 has the same precision
        ROUGH: tl.constexpr = "ieee" if DOT == "ieee" else "tf32"
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=ROUGH)


@triton.jit
def place_of_program(H, spans, P: tl.constexpr, ROWS: tl.constexpr):
    """The program's row, the number of rows, head, first row of the head's state, and span.

    Heads vary fastest, so that neighbouring programs load the same parts of B and C.
    """
    parts = tl.cdiv(P, ROWS)
    part, span, row = index_of_three(H * parts, spans)
    rows = (tl.num_programs(0) // (H * parts * spans)).to(tl.int64)
    return row, rows, (part // parts).to(tl.int64), part % parts * ROWS, span


@triton.jit
def load_tokens(X, at, stride, inside, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load `[L, BLOCK]`: a tile's tokens, from column `first`; `at` is the first one's offset."""
    i, column = tl.arange(0, inside.shape[0]), first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(X + at + i[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(X, at, stride, x, inside, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile's tokens; see `load_tokens`."""
    i, column = tl.arange(0, inside.shape[0]), first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (column < SIZE)[None, :]
    x = x.to(X.dtype.element_ty)
    tl.store(X + at + i[:, None] * stride + column[None, :], x, mask=mask)


@triton.jit
def _places(first, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets `[ROWS, COLUMNS]` into a state `[P, N]` from row `first`, and which of them exist."""
    p, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return p[:, None] * N + n[None, :], (p < P - first)[:, None] & (n < N)[None, :]


@triton.jit
def load_states(
    X,
    other,
    first,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PENDING: tl.constexpr,
):
    """Load the readable state, and the pending one, which is `other` elements after it."""
    place, exist = _places(first, P, N, ROWS, COLUMNS)
    readable = tl.load(X + first * N + place, mask=exist, other=0.0)
    pending = readable
    if PENDING:
        pending = tl.load(X + other + first * N + place, mask=exist, other=0.0)
    return readable, pending


@triton.jit
def store_states(
    X,
    other,
    first,
    readable,
    pending,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PENDING: tl.constexpr,
):
    """Store both states; see `load_states`."""
    place, exist = _places(first, P, N, ROWS, COLUMNS)
    tl.store(X + first * N + place, readable, mask=exist)
    if PENDING:
        tl.store(X + other + first * N + place, pending, mask=exist)


@triton.jit
def edges(
    START,
    UNTIL,
    row,
    until_row,
    t0,
    T,
    TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    PENDING: tl.constexpr,
):
    """The last token's segment start and `until`, and the `until` of the token after the tile.

    If the last token's `until >= t0`, some token reads writes of the tile, or the pending state
    before it. If that of the next token is less than the tile's end, something is pending after it.
    """
    t1 = tl.minimum(t0 + TOKENS, T)
    start = tl.load(START + row + t1 - 1) if PACKED else -1
    last = tl.load(UNTIL + until_row + t1 - 1) if PENDING else t0
    next_one = tl.load(UNTIL + until_row + t1) if PENDING else t0 + TOKENS
    return start, last, next_one


@triton.jit
def _sum_decays(DECAY, SUMS, T, H, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Cumulative sums of log-decays in base 2 within each tile, `[2, B, H, tiles * L]`.

    Their rounded values, and the rounding errors: after a strong decay, differences of float32 sums
    alone would lose all precision.
    """
    tiles, groups = tl.cdiv(T, TOKENS), tl.cdiv(H, HEADS)
    tile, group, b = index_of_three(tiles, groups)
    batch, padded = tl.num_programs(0) // (tiles * groups), tl.cast(tiles, tl.int64) * TOKENS
    t, h = tile * TOKENS + tl.arange(0, TOKENS), group * HEADS + tl.arange(0, HEADS)
    exist = h < H
    at = DECAY + b * T * H + t.to(tl.int64)[:, None] * H + h[None, :]
    log = tl.load(at, mask=(t < T)[:, None] & exist[None, :], other=0.0)
    sums = tl.cumsum(log.to(tl.float64) * LOG2E, 0)
    lead = sums.to(SUMS.dtype.element_ty)
    out = SUMS + (b * H + h)[None, :] * padded + t[:, None]
    tl.store(out, lead, mask=exist[None, :])
    tl.store(out + batch * H * padded, (sums - lead).to(lead.dtype), mask=exist[None, :])


@triton.jit
def load_sums(SUMS, other, TOKENS: tl.constexpr):
    """A tile's sums of log-decays up to and including each token, and the total: `decay_sums`."""
    i = tl.arange(0, TOKENS)
    lead, rest = tl.load(SUMS + i), tl.load(SUMS + other + i)
    return lead, rest, tl.load(SUMS + TOKENS - 1), tl.load(SUMS + other + TOKENS - 1)


@triton.jit
def entering(lead, START, at, t0, inside, PACKED: tl.constexpr):
    """The factor of the state before the tile, at each token."""
    fade = tl.exp2(lead)
    if PACKED:
        start = tl.load(START + at + tl.arange(0, inside.shape[0]), mask=inside, other=0)
        fade = tl.where(start < t0, fade, 0.0)
    return fade


@triton.jit
def leaving(lead, rest, total, total_rest, last_start, t0, PACKED: tl.constexpr):
    """The factor of each token's write, after the tile."""
    fade = tl.exp2((total - lead) + (total_rest - rest))
    if PACKED:
        fade = tl.where(t0 + tl.arange(0, lead.shape[0]) >= last_start, fade, 0.0)
    return fade


@triton.jit
def passing(total, last_start, t0, PACKED: tl.constexpr):
    """The factor of the state before the tile, after the tile."""
    through = tl.exp2(total)
    if PACKED:
        through = tl.where(last_start < t0, through, 0.0)
    return through


@triton.jit
def reads_late(UNTIL, until_at, t0, inside):
    """Whether each token also reads the state that is pending before the tile."""
    until = tl.load(UNTIL + until_at + tl.arange(0, inside.shape[0]), mask=inside, other=0)
    return until >= t0


@triton.jit
def between(
    lead,
    rest,
    START,
    UNTIL,
    at,
    until_at,
    t0,
    inside,
    PACKED: tl.constexpr,
    PENDING: tl.constexpr,
):
    """`[L, L]`: the factor of what token s wrote, at token t; 0 where t does not read it."""
    i = tl.arange(0, inside.shape[0])
    if PENDING:  # `until` is at most the token itself
        until = tl.load(UNTIL + until_at + i, mask=inside, other=0).to(tl.int32) - t0
        reads = i[None, :] < until[:, None]
    else:
        reads = i[None, :] <= i[:, None]
    if PACKED:
        start = tl.load(START + at + i, mask=inside, other=0).to(tl.int32) - t0
        reads = reads & (i[None, :] >= start[:, None])
    exponent = (lead[:, None] - lead[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(reads, exponent, float("-inf")))


@triton.jit
def advance(
    x,
    B,
    weight,
    readable,
    pending,
    through,
    t0,
    next_until,
    DOT: tl.constexpr,
    PENDING: tl.constexpr,
):
    """The states after a tile whose tokens write `weight x B^T`."""
    if PENDING:
        moves = next_until >= t0
        readable = through * (readable + tl.where(moves, pending, 0.0))
        pending = through * tl.where(moves, 0.0, pending)
        is_early = t0 + tl.arange(0, x.shape[0]) < next_until
        if next_until > t0:
            early = tl.where(is_early, weight, 0.0)
            readable += exact(tl.trans(x * early[:, None]), B, DOT)
        weight = tl.where(is_early, 0.0, weight)
        pending += exact(tl.trans(x * weight[:, None]), B, DOT)
    else:
        readable = through * readable + exact(tl.trans(x * weight[:, None]), B, DOT)
    return readable, pending


@triton.jit
def advance_back(
    dy,
    C,
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
    DOT: tl.constexpr,
    PENDING: tl.constexpr,
):
    """Gradients of the states before a tile whose tokens read `weight state C`."""
    if PENDING:
        pending = through * tl.where(next_until >= t0, readable, pending)
        if last_until >= t0:
            late = tl.where(reads_late(UNTIL, until_at, t0, inside), weight, 0.0)
            pending += exact(tl.trans(dy * late[:, None]), C, DOT)
    readable = through * readable + exact(tl.trans(dy * weight[:, None]), C, DOT)
    return readable, pending


def decay_sums(log_decay: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """Cumulative sums within each tile `[2, B, H, tiles * tokens]` of log-decays `[B, T, H]`."""
    batch, length, heads = log_decay.shape
    tiles, few = triton.cdiv(length, tokens), min(16, triton.next_power_of_2(heads))
    sums = log_decay.new_empty(2, batch, heads, tiles * tokens, dtype=dtype)
    _sum_decays[grid(tiles, triton.cdiv(heads, few), batch)](
        log_decay, sums, length, heads, tokens, few, num_warps=4
    )
    return sums


def strided(x: Tensor) -> Tensor:
    """x, or a copy if rows are not contiguous, or too far apart for 32-bit offsets in a tile."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()
