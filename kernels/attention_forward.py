"""Sparse causal attention: one softmax over a range of keys and a short list of far keys.

The query heads that share a key head are rows of one tile: row r of group g is the query of token
`r // SHARE` and head `g * SHARE + r % SHARE`. So the keys are read once per group, and in decoding
a single token of a large group fills a tile. Keys are numbered from the first cached one. `FIRST`
holds the first key of each token's range and never decreases from token to token. So the first and
last rows of a tile tell which blocks of keys need a mask (some at both ends) and which do not.

If there are few rows and many keys, the keys are split between programs, and `_merge` combines the
parts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx_layers.kernels.grid import grid, index_of_two
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import dot_precision, pick, processors

check_import_name(__name__)


class Tiles(NamedTuple):
    """Rows (queries) and keys of a tile, and the launch options."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Choices(NamedTuple):
    """Tiles by head_dim for 16-bit inputs, and those for wider inputs with a head_dim up to 128."""

    upto_64: Tiles
    upto_128: Tiles
    upto_256: Tiles
    wide: Tiles

    def of(self, dtype: torch.dtype, head: int) -> Tiles:
        """The tiles for a dtype and a padded head_dim."""
        if dtype.itemsize > 2:
            return self.wide
        return self.upto_64 if head <= 64 else self.upto_128 if head <= 128 else self.upto_256


def table(**rows: tuple[tuple[int, int, int, int], ...]) -> dict[str, Choices]:
    """Tiles by target, each row in the order of the fields of `Choices`."""
    return {target: Choices(*(Tiles(*tiles) for tiles in row)) for target, row in rows.items()}


FORWARD = table(
    default=((64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1), (16, 32, 8, 1)),
    sm_80=((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1)),
    sm_90=((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1)),
    sm_100=((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (16, 32, 8, 1)),
    gfx942=((128, 64, 4, 1), (128, 32, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)),
)
# For calls with no more rows than these, such as one token of 16 heads that share a key head.
DECODE = table(default=((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 8, 1)))
FAR_KEYS = 16  # far keys that a program takes at a time


@triton.jit
def _load(X, at, inside, d, P: tl.constexpr, HEAD: tl.constexpr):
    """Load a tile; rows that are not inside are 0."""
    mask = inside[:, None]
    if P < HEAD:
        mask = mask & (d < P)[None, :]
    return tl.load(X + at, mask=mask, other=0.0)


@triton.jit
def _load_block(X, at, n, end, d, P: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """Load a block whose rows have the numbers n; only masked blocks may exceed the end."""
    if MASKED:
        return _load(X, at, n < end, d, P, HEAD)
    if P < HEAD:
        return tl.load(X + at, mask=(d < P)[None, :], other=0.0)
    return tl.load(X + at)


@triton.jit
def _store(X, at, x, inside, d, P: tl.constexpr, HEAD: tl.constexpr):
    """Store the rows of a tile that are inside."""
    mask = inside[:, None]
    if P < HEAD:
        mask = mask & (d < P)[None, :]
    tl.store(X + at, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def ends(tile, T, SHARE: tl.constexpr, ROWS: tl.constexpr):
    """The tokens of the first and last row of a tile."""
    return tile * ROWS // SHARE, tl.minimum(((tile + 1) * ROWS - 1) // SHARE, T - 1)


@triton.jit
def blocks(begin, end, whole_begin, whole_end, STEP: tl.constexpr):
    """Divide `[begin, end)` into blocks of STEP; those inside the whole part need no mask.

    Returns begin and both ends of the whole part, rounded to multiples of STEP, the number of
    masked blocks before the whole part, and the number of all masked blocks.
    """
    begin = begin // STEP * STEP
    end = tl.maximum(tl.cdiv(end, STEP) * STEP, begin)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_begin, STEP) * STEP, begin), end)
    whole_end = tl.maximum(tl.minimum(whole_end // STEP * STEP, end), whole_begin)
    left = (whole_begin - begin) // STEP
    return begin, whole_begin, whole_end, left, left + (end - whole_end) // STEP


@triton.jit
def masked_block(i, begin, whole_end, left, STEP: tl.constexpr):
    """The begin of the i-th masked block."""
    n = tl.where(i < left, begin + i * STEP, whole_end + (i - left) * STEP)
    return tl.multiple_of(n, STEP)


@triton.jit
def _add(acc, total, top, scores, v, scale, DOT: tl.constexpr):
    """A step of online softmax in base 2; `top` is the largest exponent so far, always finite."""
    highest = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    fade = tl.exp2(top - highest)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(
        weights.to(v.dtype), v, acc * fade[:, None], input_precision=DOT, out_dtype=acc.dtype
    )
    return acc, total, highest


@triton.jit
def _forward(
    Q, K, V, FIRST, FAR_Q, FAR_K, FAR_V, FAR_MASK, O, LSE,
    q_b, q_h, q_t, k_b, k_g, k_t, v_b, v_g, v_t, first_b, mask_b, mask_g,
    T, prefix, F, lists, block, scale,
    G: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr, HEAD: tl.constexpr,
    FAR: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FAR_KEYS: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * SHARE, ROWS)
    part, pair = index_of_two(tiles * SPLITS)  # the pair is a row of the batch and a group
    split, b, g = part % SPLITS, pair // G, pair % G
    # The last tiles first, since they have the most keys in full attention.
    tile = tiles - 1 - part // SPLITS
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < T * SHARE
    t, h, d = row // SHARE, (g * SHARE + row % SHARE).to(tl.int64), tl.arange(0, HEAD)
    first_token, last_token = (
        tile * ROWS // SHARE,
        tl.minimum(((tile + 1) * ROWS - 1) // SHARE, T - 1),
    )
    at = b * q_b + h[:, None] * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    acc = tl.zeros((ROWS, HEAD), PRECISE)
    total = tl.zeros((ROWS,), PRECISE)
    top = tl.full((ROWS,), -1e30, PRECISE)

    if FAR:
        pieces = tl.cdiv(F, FAR_KEYS)
        low = first_token // block
        count = (last_token // block - low + 1) * pieces
        q = _load(FAR_Q, at, inside, d, P, HEAD)
        for i in range(count if split == 0 else 0):
            list = low + i // pieces
            f = i % pieces * FAR_KEYS + tl.arange(0, FAR_KEYS)
            far = ((b * G + g) * lists + list) * F + f
            far = far[:, None] * P + d[None, :]
            k = _load(FAR_K, far, f < F, d, P, HEAD)
            seen = (inside & (t // block == list))[:, None] & (f < F)[None, :]
            mask_at = b * mask_b + g * mask_g + t.to(tl.int64)[:, None] * F + f[None, :]
            seen = seen & (tl.load(FAR_MASK + mask_at, mask=seen, other=0) != 0)
            scores = tl.dot(q, tl.trans(k), input_precision=DOT, out_dtype=PRECISE)
            scores = tl.where(seen, scores, float("-inf"))
            v = _load(FAR_V, far, f < F, d, P, HEAD)
            acc, total, top = _add(acc, total, top, scores, v, scale, DOT)

    S = prefix + T
    first = tl.load(FIRST + b * first_b + t, mask=inside, other=S) + prefix
    begin = tl.load(FIRST + b * first_b + first_token) + prefix
    end = last_token + prefix + 1
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end, KEYS) - begin // KEYS, SPLITS) * KEYS
        begin = begin // KEYS * KEYS + split * share
        end = tl.minimum(begin + share, end)
    begin, whole_begin, whole_end, left, masked = blocks(
        begin,
        end,
        tl.load(FIRST + b * first_b + last_token) + prefix,
        first_token + prefix + 1,
        KEYS,
    )
    q = _load(Q, at, inside, d, P, HEAD)
    j = tl.arange(0, KEYS)
    K += b * k_b + g * k_g
    V += b * v_b + g * v_g
    k_at, v_at = j[:, None] * k_t + d[None, :], j[:, None] * v_t + d[None, :]
    for i in tl.range(0, masked, num_stages=STAGES):
        n = masked_block(i, begin, whole_end, left, KEYS)
        k = _load_block(K + n.to(tl.int64) * k_t, k_at, n + j, S, d, P, HEAD, True)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT, out_dtype=PRECISE)
        seen = (n + j >= first[:, None]) & (n + j <= (t + prefix)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        v = _load_block(V + n.to(tl.int64) * v_t, v_at, n + j, S, d, P, HEAD, True)
        acc, total, top = _add(acc, total, top, scores, v, scale, DOT)
    for n in tl.range(whole_begin, whole_end, KEYS, num_stages=STAGES):
        n = tl.multiple_of(n, KEYS)
        k = _load_block(K + n.to(tl.int64) * k_t, k_at, n + j, S, d, P, HEAD, False)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT, out_dtype=PRECISE)
        v = _load_block(V + n.to(tl.int64) * v_t, v_at, n + j, S, d, P, HEAD, False)
        acc, total, top = _add(acc, total, top, scores, v, scale, DOT)

    # No keys: rows beyond the last token, and rows that have none in this split.
    total = tl.where(total == 0, 1, total)
    acc = acc / total[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453
    out = split * (tl.num_programs(0) // (tiles * SPLITS) // G) + b
    heads = G * SHARE
    tl.store(LSE + (out * heads + h) * T + t, lse, mask=inside)
    _store(O, ((out * T + t) * heads + h)[:, None] * P + d[None, :], acc, inside, d, P, HEAD)


@triton.jit
def _merge(
    PARTS,
    PART_LSE,
    O,
    LSE,
    rows,
    T,
    heads,
    P: tl.constexpr,
    HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One row: the average of all splits, weighted by their parts of the softmax's denominator."""
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, PADDED), tl.arange(0, HEAD)
    b, t, h = row // (T * heads), row // heads % T, row % heads
    at = (b * heads + h) * T + t
    lse = tl.load(PART_LSE + split * rows + at, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp(lse - top)
    total = tl.sum(weights, 0)
    mask = (split < SPLITS)[:, None] & (d < P)[None, :]
    parts = tl.load(PARTS + (split * rows + row)[:, None] * P + d[None, :], mask=mask, other=0.0)
    o = tl.sum(parts * weights[:, None], 0) / total
    tl.store(O + row * P + d, o.to(O.dtype.element_ty), mask=d < P)
    tl.store(LSE + at, top + tl.log(total))


def strided(x: Tensor) -> Tensor:
    """x, or a copy if rows are not contiguous, or too far apart for 32-bit offsets in a tile."""
    return x if x.stride(-1) == 1 and x.stride(2) < 2**23 else x.contiguous()


def by_token(x: Tensor) -> Tensor:
    """x `[B, H, T, P]`, stored as `[B, T, H, P]`, which is the layout that the kernels write."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_by_token(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape `[B, H, T, P]`, stored as `[B, T, H, P]`."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


class Call(NamedTuple):
    """The arguments of a call, as the forward and backward kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    far: tuple[Tensor | None, ...]  # q, k, v, mask
    strides: tuple[int, ...]  # q, k, v: batch, head, token; first: batch; mask: batch, head
    sizes: tuple[Any, ...]  # T, prefix, F, lists, block
    head: int
    options: tuple[Any, ...]  # G, SHARE, P, HEAD, FAR
    precise: Any
    dot: str


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    far_v: Tensor | None,
    far_mask: Tensor | None,
    far_block: int,
) -> Call:
    """Arrange the arguments of a call; tensors are copied only where the kernels need it."""
    q, k, v = strided(q), strided(k), strided(v)
    heads, length, dim = q.shape[1:]
    groups = k.shape[1]
    count = lists = mask_b = mask_g = 0
    if far_q is not None:
        if far_q.stride() != q.stride():
            q, far_q = by_token(q), by_token(far_q)
        far_k, far_v, far_mask = far_k.contiguous(), far_v.contiguous(), far_mask.contiguous()
        lists, count = far_k.shape[2:4]
        mask_b, mask_g = (0 if far_mask.shape[n] == 1 else far_mask.stride(n) for n in (0, 1))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    strides += (0 if first.shape[0] == 1 else length, mask_b, mask_g)
    head = max(16, triton.next_power_of_2(dim))
    return Call(
        q,
        k,
        v,
        (far_q, far_k, far_v, far_mask),
        strides,
        (length, k.shape[2] - length, count, lists, max(min(far_block, length), 1)),
        head,
        (groups, heads // groups, dim, head, far_q is not None),
        tl.float64 if q.dtype == torch.float64 else tl.float32,
        dot_precision(q.dtype),
    )


def _splits(call: Call, tiles: Tiles, programs: int) -> int:
    """How often to split the keys: for about two programs per processor, of at least 4 blocks."""
    wanted = 2 * processors(call.q.device) // programs
    return max(1, min(wanted, call.k.shape[2] // (4 * tiles.keys), 64))


def forward(
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
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see `longctx_layers.ops.sparse_attention` for the other arguments.

    Args:
        first: `[B or 1, T]` int32, the first key of each query's range, counted from the call's
            first token. It never decreases from one token to the next.
        scale: factor on the scores, above 0.

    Returns:
        `[B, H, T, P]` in q's dtype, and `[B, H, T]` in at least float32, the natural logarithm of
        the sum of exponentials of each query's scores.
    """
    call = prepare(q, k, v, first, far_q, far_k, far_v, far_mask, far_block)
    batch, heads, length, dim = q.shape
    share, precise = heads // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    tiles = pick(DECODE).of(q.dtype, call.head)
    if length * share > tiles.rows:
        tiles = pick(FORWARD).of(q.dtype, call.head)
    count = triton.cdiv(length * share, tiles.rows)
    splits = _splits(call, tiles, count * batch * k.shape[1])
    o, lse = empty_by_token(q), q.new_empty(batch, heads, length, dtype=precise)
    parts, part_lse = o, lse
    if splits > 1:
        parts = q.new_empty(splits, batch, length, heads, dim, dtype=precise)
        part_lse = q.new_empty(splits, batch, heads, length, dtype=precise)
    _forward[grid(count * splits, batch * k.shape[1])](
        call.q, call.k, call.v, first, *call.far, parts, part_lse,
        *call.strides, *call.sizes, scale * math.log2(math.e),
        *call.options, splits, tiles.rows, tiles.keys, FAR_KEYS, call.precise, call.dot,
        tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    if splits > 1:
        rows = batch * length * heads
        _merge[grid(rows)](
            parts,
            part_lse,
            o,
            lse,
            rows,
            length,
            heads,
            dim,
            call.head,
            splits,
            triton.next_power_of_2(splits),
        )
    return o, lse
