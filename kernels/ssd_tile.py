"""What a tile of L tokens does to a selective state: the pieces of which all its kernels are made.

With S the sums of log-decays since the tile began, token t reads what token s wrote, fading by
`exp(S_t - S_s)`, and everything is a product of matrices. For `block_ssd` the state is two: what is
readable, and what is pending until its chunk ends. Token t then reads writes before `until[t]`
only, and what is pending moves over in the tile in which, or right behind which, a chunk begins.

`row`, `until_row`, `at` and `until_at` are where a row or a tile begins in START and UNTIL (`at` in
all that is `[B, T]`), and `t0` is the index of the tile's first token in its row.
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
    """`a @ b` as exact as float32, of which one may be wider than the other."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=DOT)
    elif b.dtype == tl.bfloat16:  # three numbers of 8 bits hold one of 24
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
    """`a @ b` to the precision of the narrower one, for what is rounded to that in the end."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=DOT)
    elif b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b)
    elif a.dtype == tl.bfloat16:
        return tl.dot(a, b.to(tl.bfloat16))
    else:  # a state may leave float16's range; TF32 has its precision
        ROUGH: tl.constexpr = "ieee" if DOT == "ieee" else "tf32"
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=ROUGH)


@triton.jit
def place_of_program(H, spans, P: tl.constexpr, ROWS: tl.constexpr):
    """Its row (of how many), head, first row of the head's state, and span.

    Heads run fastest, so that programs side by side share what they load of B and C.
    """
    parts = tl.cdiv(P, ROWS)
    part, span, row = index_of_three(H * parts, spans)
    rows = (tl.num_programs(0) // (H * parts * spans)).to(tl.int64)
    return row, rows, (part // parts).to(tl.int64), part % parts * ROWS, span


@triton.jit
def load_tokens(X, at, stride, inside, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`[L, BLOCK]`: a tile's tokens from a column on; `at` is where the first one begins."""
    i, column = tl.arange(0, inside.shape[0]), first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(X + at + i[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(X, at, stride, x, inside, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_tokens`."""
    i, column = tl.arange(0, inside.shape[0]), first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (column < SIZE)[None, :]
    x = x.to(X.dtype.element_ty)
    tl.store(X + at + i[:, None] * stride + column[None, :], x, mask=mask)


@triton.jit
def _places(first, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets `[ROWS, COLUMNS]` into a state `[P, N]` from row `first` on, and which exist."""
    p, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return p[:, None] * N + n[None, :], (p < P - first)[:, None] & (n < N)[None, :]


@triton.jit
def load_states(
    X, other, first,
    P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PENDING: tl.constexpr,
):  # fmt: skip
    """The readable state, and the pending one that stands `other` elements behind it."""
    place, exist = _places(first, P, N, ROWS, COLUMNS)
    readable = tl.load(X + first * N + place, mask=exist, other=0.0)
    pending = readable
    if PENDING:
        pending = tl.load(X + other + first * N + place, mask=exist, other=0.0)
    return readable, pending


@triton.jit
def store_states(
    X, other, first, readable, pending,
    P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PENDING: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_states`."""
    place, exist = _places(first, P, N, ROWS, COLUMNS)
    tl.store(X + first * N + place, readable, mask=exist)
    if PENDING:
        tl.store(X + other + first * N + place, pending, mask=exist)


@triton.jit
def edges(
    START, UNTIL, row, until_row, t0, T,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """Of the last token where its segment starts, and its `until`; and the next token's.

    If the first `until >= t0`, some token reads others of the tile, or what is pending before it;
    if the second one is in the tile or before it, something is pending behind it.
    """
    t1 = tl.minimum(t0 + TOKENS, T)
    start = tl.load(START + row + t1 - 1) if PACKED else -1
    last = tl.load(UNTIL + until_row + t1 - 1) if PENDING else t0
    next_one = tl.load(UNTIL + until_row + t1) if PENDING else t0 + TOKENS
    return start, last, next_one


@triton.jit
def _sum_decays(
    DECAY, SUMS, T, H, TOKENS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Sums of log-decays in base 2 since the tile began, `[2, B, H, tiles * L]`: rounded, and what
    rounding lost. Differences of float32 sums would lose all precision behind a strong decay.
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
    """A tile's sums of log-decays up to and with each token, and of all; see `decay_sums`."""
    i = tl.arange(0, TOKENS)
    lead, rest = tl.load(SUMS + i), tl.load(SUMS + other + i)
    return lead, rest, tl.load(SUMS + TOKENS - 1), tl.load(SUMS + other + TOKENS - 1)


@triton.jit
def entering(lead, START, at, t0, inside, PACKED: tl.constexpr):
    """What is left of the state before the tile at each token."""
    fade = tl.exp2(lead)
    if PACKED:
        start = tl.load(START + at + tl.arange(0, inside.shape[0]), mask=inside, other=0)
        fade = tl.where(start < t0, fade, 0.0)
    return fade


@triton.jit
def leaving(lead, rest, total, total_rest, last_start, t0, PACKED: tl.constexpr):
    """What is left of each token's write behind the tile."""
    fade = tl.exp2((total - lead) + (total_rest - rest))
    if PACKED:
        fade = tl.where(t0 + tl.arange(0, lead.shape[0]) >= last_start, fade, 0.0)
    return fade


@triton.jit
def passing(total, last_start, t0, PACKED: tl.constexpr):
    """What is left behind the tile of the state before it."""
    through = tl.exp2(total)
    if PACKED:
        through = tl.where(last_start < t0, through, 0.0)
    return through


@triton.jit
def reads_late(UNTIL, until_at, t0, inside):
    """Whether each token reads all that was written before the tile, pending or not."""
    until = tl.load(UNTIL + until_at + tl.arange(0, inside.shape[0]), mask=inside, other=0)
    return until >= t0


@triton.jit
def between(
    lead, rest, START, UNTIL, at, until_at, t0, inside,
    PACKED: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """`[L, L]`: what is left at t of the write of s, 0 where t does not read it."""
    i = tl.arange(0, inside.shape[0])
    if PENDING:  # `until` is never behind the token itself
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
def behind(
    x, B, weight, readable, pending, through, t0, next_until,
    DOT: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """The states behind a tile whose tokens write `weight x B^T`."""
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
def before(
    dy, C, weight, readable, pending, through, UNTIL, until_at, t0, inside, last_until, next_until,
    DOT: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """Gradients of the states before a tile whose tokens read `weight state C`."""
    if PENDING:
        pending = through * tl.where(next_until >= t0, readable, pending)
        if last_until >= t0:
            late = tl.where(reads_late(UNTIL, until_at, t0, inside), weight, 0.0)
            pending += exact(tl.trans(dy * late[:, None]), C, DOT)
    readable = through * readable + exact(tl.trans(dy * weight[:, None]), C, DOT)
    return readable, pending


def decay_sums(log_decay: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """Sums of log-decays `[B, T, H]` within each tile, `[2, B, H, tiles * tokens]`."""
    batch, length, heads = log_decay.shape
    tiles, few = triton.cdiv(length, tokens), min(16, triton.next_power_of_2(heads))
    sums = log_decay.new_empty(2, batch, heads, tiles * tokens, dtype=dtype)
    _sum_decays[grid(tiles, triton.cdiv(heads, few), batch)](
        log_decay, sums, length, heads, tokens, few, num_warps=4
    )
    return sums


def strided(x: Tensor) -> Tensor:
    """x; copied if rows are not contiguous, or too far apart for offsets of 32 bits in a tile."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()
