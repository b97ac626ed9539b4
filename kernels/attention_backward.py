"""Gradients of sparse attention, without atomics, so that they are the same in every run.

Each kernel recomputes the attention weights that it needs, from the scores and the log-sum-exp.
`_queries` takes a tile of rows and loops over its keys. `_keys` takes a tile of keys and loops over
the rows that see it, of all heads of the group. `_far` takes a tile of the rows that share a list
of far keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.attention_forward import (
    _load,
    _load_block,
    _store,
    blocks,
    by_token,
    empty_by_token,
    ends,
    masked_block,
    prepare,
    table,
)
from longctx_layers.kernels.grid import grid, index_of_three, index_of_two
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import pick

check_import_name(__name__)

QUERIES = table(
    default=((64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1)),
    sm_80=((128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1), (16, 32, 8, 1)),
    sm_90=((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 4, 1), (16, 32, 8, 1)),
    sm_100=((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1), (16, 32, 8, 1)),
    gfx942=((128, 32, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
)
KEYS = table(
    default=((32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 8, 1)),
    sm_80=((32, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 1), (16, 16, 8, 1)),
    sm_90=((64, 128, 8, 2), (32, 128, 8, 2), (64, 32, 8, 1), (16, 16, 8, 1)),
    sm_100=((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1), (16, 16, 8, 1)),
    gfx942=((32, 128, 4, 1), (32, 128, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
)
FAR = table(default=((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1)))
DELTA_ROWS = 32


@triton.jit
def _delta(
    O,
    DO,
    DLSE,
    DELTA,
    rows,
    T,
    heads,
    P: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """`o . do` minus the gradient of the log-sum-exp: the term that all weights of a row share."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    inside = row < rows
    at = row[:, None] * P + d[None, :]
    o = _load(O, at, inside, d, P, HEAD).to(PRECISE)
    do = _load(DO, at, inside, d, P, HEAD).to(PRECISE)
    token = row // heads
    out = (token // T * heads + row % heads) * T + token % T
    delta = tl.sum(o * do, 1) - tl.load(DLSE + out, mask=inside, other=0.0)
    tl.store(DELTA + out, delta, mask=inside)


@triton.jit
def _gradient(scores, seen, lse, dp, delta, scale, MASKED: tl.constexpr):
    """The weights, and the gradient of the scores after scaling."""
    weights = tl.exp2(scores * scale - lse)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return weights, weights * (dp - delta)


@triton.jit
def _to_queries(
    dq, q, do, lse, delta, first, end, K, V, n, k_at, v_at, k_t, v_t, j, d, S, scale,
    P: tl.constexpr, HEAD: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the block of keys that begins at n to the gradient of q."""
    k = _load_block(K + n.to(tl.int64) * k_t, k_at, n + j, S, d, P, HEAD, MASKED)
    v = _load_block(V + n.to(tl.int64) * v_t, v_at, n + j, S, d, P, HEAD, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=DOT, out_dtype=dq.dtype)
    dp = tl.dot(do, tl.trans(v), input_precision=DOT, out_dtype=dq.dtype)
    seen = (n + j >= first[:, None]) & (n + j < end[:, None])
    _, ds = _gradient(scores, seen, lse[:, None], dp, delta[:, None], scale, MASKED)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT, out_dtype=dq.dtype)


@triton.jit
def _queries(
    Q, K, V, FIRST, DO, LSE, DELTA, DQ,
    q_b, q_h, q_t, k_b, k_g, k_t, v_b, v_g, v_t, first_b, T, prefix, scale, natural_scale,
    G: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of q, without that through far keys."""
    tiles = tl.cdiv(T * SHARE, ROWS)
    tile, pair = index_of_two(tiles)  # the pair is a row of the batch and a group
    tile, b, g = tiles - 1 - tile, pair // G, pair % G
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < T * SHARE
    t, h, d = row // SHARE, g * SHARE + row % SHARE, tl.arange(0, HEAD)
    first_token, last_token = ends(tile, T, SHARE, ROWS)
    q_at = b * q_b + h[:, None] * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    out = ((b * T + t) * (G * SHARE) + h)[:, None] * P + d[None, :]
    number = (b * G * SHARE + h) * T + t
    q, do = _load(Q, q_at, inside, d, P, HEAD), _load(DO, out, inside, d, P, HEAD)
    lse = tl.load(LSE + number, mask=inside, other=0.0) * 1.4426950408889634
    delta = tl.load(DELTA + number, mask=inside, other=0.0)
    first = tl.load(FIRST + b * first_b + t, mask=inside, other=T) + prefix
    begin, whole_begin, whole_end, left, masked = blocks(
        tl.load(FIRST + b * first_b + first_token) + prefix,
        last_token + prefix + 1,
        tl.load(FIRST + b * first_b + last_token) + prefix,
        first_token + prefix + 1,
        KEYS,
    )
    j = tl.arange(0, KEYS)
    K += b * k_b + g * k_g
    V += b * v_b + g * v_g
    k_at, v_at = j[:, None] * k_t + d[None, :], j[:, None] * v_t + d[None, :]
    dq = tl.zeros((ROWS, HEAD), PRECISE)
    end, S = t + prefix + 1, T + prefix
    for i in tl.range(0, masked, num_stages=STAGES):
        n = masked_block(i, begin, whole_end, left, KEYS)
        dq = _to_queries(
            dq, q, do, lse, delta, first, end, K, V, n, k_at, v_at, k_t, v_t, j, d, S, scale,
            P, HEAD, DOT, True,
        )  # fmt: skip
    for n in tl.range(whole_begin, whole_end, KEYS, num_stages=STAGES):
        n = tl.multiple_of(n, KEYS)
        dq = _to_queries(
            dq, q, do, lse, delta, first, end, K, V, n, k_at, v_at, k_t, v_t, j, d, S, scale,
            P, HEAD, DOT, False,
        )  # fmt: skip
    _store(DQ, out, dq * natural_scale, inside, d, P, HEAD)


@triton.jit
def _to_keys(
    dk, dv, k, v, Q, DO, FIRST, LSE, DELTA, row, key, b, g, q_h, q_t, T, prefix, d, scale,
    G: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, HEAD: tl.constexpr,
    DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of a tile of rows to the gradients of k and v; scores are transposed."""
    t, h, inside = row // SHARE, g * SHARE + row % SHARE, row < T * SHARE
    at = h[:, None] * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    out = ((b * T + t) * (G * SHARE) + h)[:, None] * P + d[None, :]
    number = (b * G * SHARE + h) * T + t
    q = _load_block(Q, at, row, T * SHARE, d, P, HEAD, MASKED)
    do = _load_block(DO, out, row, T * SHARE, d, P, HEAD, MASKED)
    lse = tl.load(LSE + number, mask=inside, other=0.0) * 1.4426950408889634
    delta = tl.load(DELTA + number, mask=inside, other=0.0)
    first = t
    if MASKED:
        first = tl.load(FIRST + t, mask=inside, other=0)
    scores = tl.dot(k, tl.trans(q), input_precision=DOT, out_dtype=dk.dtype)
    dp = tl.dot(v, tl.trans(do), input_precision=DOT, out_dtype=dk.dtype)
    seen = (key[:, None] >= (first + prefix)[None, :]) & (key[:, None] <= (t + prefix)[None, :])
    seen = seen & inside[None, :]
    weights, ds = _gradient(scores, seen, lse[None, :], dp, delta[None, :], scale, MASKED)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=DOT, out_dtype=dv.dtype)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=DOT, out_dtype=dk.dtype), dv


@triton.jit
def _keys(
    Q, K, V, FIRST, SEEN, DO, LSE, DELTA, DK, DV,
    q_b, q_h, q_t, k_b, k_g, k_t, v_b, v_g, v_t, first_b, seen_b, T, prefix, scale, natural_scale,
    G: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v.

    `SEEN` is the number of tokens whose ranges begin by the first, and by the last key of a tile.
    """
    S = T + prefix
    tile, pair = index_of_two(tl.cdiv(S, KEYS))
    b, g = pair // G, pair % G
    key, d = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD)
    k_at = b * k_b + g * k_g + key.to(tl.int64)[:, None] * k_t + d[None, :]
    v_at = b * v_b + g * v_g + key.to(tl.int64)[:, None] * v_t + d[None, :]
    k, v = _load(K, k_at, key < S, d, P, HEAD), _load(V, v_at, key < S, d, P, HEAD)
    seen_at = SEEN + b * seen_b + 2 * tile
    begin, whole_begin, whole_end, left, masked = blocks(
        tl.maximum(tile * KEYS - prefix, 0) * SHARE,
        tl.load(seen_at + 1) * SHARE,
        tl.maximum(tile * KEYS + KEYS - 1 - prefix, 0) * SHARE,
        tl.load(seen_at) * SHARE,
        ROWS,
    )
    Q += b * q_b
    FIRST += b * first_b
    dk, dv = tl.zeros((KEYS, HEAD), PRECISE), tl.zeros((KEYS, HEAD), PRECISE)
    for i in tl.range(0, masked, num_stages=STAGES):
        row = masked_block(i, begin, whole_end, left, ROWS) + tl.arange(0, ROWS)
        dk, dv = _to_keys(
            dk, dv, k, v, Q, DO, FIRST, LSE, DELTA, row, key, b, g, q_h, q_t, T, prefix, d, scale,
            G, SHARE, P, HEAD, DOT, True,
        )  # fmt: skip
    for begin_row in tl.range(whole_begin, whole_end, ROWS, num_stages=STAGES):
        row = tl.multiple_of(begin_row, ROWS) + tl.arange(0, ROWS)
        dk, dv = _to_keys(
            dk, dv, k, v, Q, DO, FIRST, LSE, DELTA, row, key, b, g, q_h, q_t, T, prefix, d, scale,
            G, SHARE, P, HEAD, DOT, False,
        )  # fmt: skip
    out = ((b * S + key) * G + g)[:, None] * P + d[None, :]
    _store(DK, out, dk * natural_scale, key < S, d, P, HEAD)
    _store(DV, out, dv, key < S, d, P, HEAD)


@triton.jit
def _far(
    Q, K, V, MASK, DO, LSE, DELTA, DQ, DK, DV,
    q_b, q_h, q_t, mask_b, mask_g, T, F, lists, block, tiles, scale, natural_scale,
    G: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, HEAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of the far queries, and the tile's part of those of the far keys and values."""
    tile, list, pair = index_of_three(tiles, lists)
    b, g = pair // G, pair % G
    row, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD)
    t, h = list * block + row // SHARE, g * SHARE + row % SHARE
    inside = (row < block * SHARE) & (t < T)
    q_at = b * q_b + h[:, None] * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    out = ((b * T + t) * (G * SHARE) + h)[:, None] * P + d[None, :]
    number = (b * G * SHARE + h) * T + t
    q, do = _load(Q, q_at, inside, d, P, HEAD), _load(DO, out, inside, d, P, HEAD)
    lse = tl.load(LSE + number, mask=inside, other=0.0) * 1.4426950408889634
    delta = tl.load(DELTA + number, mask=inside, other=0.0)
    dq = tl.zeros((ROWS, HEAD), PRECISE)
    of_list = (b * G + g) * lists + list
    for begin in range(0, F, KEYS):
        f = begin + tl.arange(0, KEYS)
        k_at = (of_list * F + f)[:, None] * P + d[None, :]
        k, v = _load(K, k_at, f < F, d, P, HEAD), _load(V, k_at, f < F, d, P, HEAD)
        seen = inside[:, None] & (f < F)[None, :]
        mask_at = b * mask_b + g * mask_g + t.to(tl.int64)[:, None] * F + f[None, :]
        seen = tl.load(MASK + mask_at, mask=seen, other=0) != 0
        scores = tl.dot(q, tl.trans(k), input_precision=DOT, out_dtype=PRECISE)
        dp = tl.dot(do, tl.trans(v), input_precision=DOT, out_dtype=PRECISE)
        weights, ds = _gradient(scores, seen, lse[:, None], dp, delta[:, None], scale, True)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT, out_dtype=PRECISE)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=DOT, out_dtype=PRECISE)
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=DOT, out_dtype=PRECISE)
        share = ((of_list * tiles + tile) * F + f)[:, None] * P + d[None, :]
        _store(DK, share, dk * natural_scale, f < F, d, P, HEAD)
        _store(DV, share, dv, f < F, d, P, HEAD)
    _store(DQ, out, dq * natural_scale, inside, d, P, HEAD)


def backward(
    do: Tensor,
    dlse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    far_v: Tensor | None,
    far_mask: Tensor | None,
    far_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, far_q, far_k and far_v; the last three are empty without far keys."""
    call = prepare(q, k, v, first, far_q, far_k, far_v, far_mask, far_block)
    (batch, heads, length, dim), (groups, keys) = q.shape, k.shape[1:3]
    share, (_, prefix, count, lists, block) = heads // groups, call.sizes
    o, do, dlse = by_token(o), by_token(do), dlse.contiguous()
    shape, dots = (groups, share, dim, call.head), (call.precise, call.dot)
    scales = scale * math.log2(math.e), scale
    delta = torch.empty_like(lse)
    _delta[grid(triton.cdiv(lse.numel(), DELTA_ROWS))](
        o, do, dlse, delta, lse.numel(), length, heads, dim, call.head, DELTA_ROWS, call.precise
    )
    dq, dk, dv = (empty_by_token(x) for x in (q, k, v))
    tiles = pick(QUERIES).of(q.dtype, call.head)
    _queries[grid(triton.cdiv(length * share, tiles.rows), batch * groups)](
        call.q,
        call.k,
        call.v,
        first,
        do,
        lse,
        delta,
        dq,
        *call.strides[:10],
        length,
        prefix,
        *scales,
        *shape,
        tiles.rows,
        tiles.keys,
        *dots,
        tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    tiles = pick(KEYS).of(q.dtype, call.head)
    # Since `first` never decreases, the tokens that see a key are those before a place in it.
    edge = torch.arange(-prefix, length, tiles.keys, device=q.device, dtype=torch.int32)
    edges = torch.stack([edge, edge + (tiles.keys - 1)], dim=1).flatten()
    seen = torch.searchsorted(
        first, edges.expand(len(first), -1).contiguous(), right=True, out_int32=True
    )
    _keys[grid(triton.cdiv(keys, tiles.keys), batch * groups)](
        call.q, call.k, call.v, first, seen, do, lse, delta, dk, dv, *call.strides[:10],
        0 if len(first) == 1 else seen.shape[1], length, prefix, *scales, *shape,
        tiles.rows, tiles.keys, *dots, tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    if far_q is None or far_k is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0), q.new_empty(0)
    dfar_q, tiles = empty_by_token(q), pick(FAR).of(q.dtype, call.head)
    parts = triton.cdiv(min(block, length) * share, tiles.rows)
    dfar_k, dfar_v = (
        q.new_empty(batch, groups, lists, parts, count, dim, dtype=lse.dtype) for _ in range(2)
    )
    far_q, far_k, far_v, far_mask = call.far
    # Few far keys make small products. They are "ieee", since three of TF32 would spill registers.
    _far[grid(parts, lists, batch * groups)](
        far_q, far_k, far_v, far_mask, do, lse, delta, dfar_q, dfar_k, dfar_v,
        *call.strides[:3], *call.strides[10:], length, count, lists, block, parts, *scales,
        *shape, tiles.rows, tiles.keys, call.precise, "ieee", num_warps=tiles.num_warps,
    )  # fmt: skip
    return dq, dk, dv, dfar_q, *(x.sum(3).to(q.dtype) for x in (dfar_k, dfar_v))
