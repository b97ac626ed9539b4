"""Sparse causal attention: a contiguous range of near keys and a short list of far ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx_layers.ops import reference
from longctx_layers.ops.checks import expect_dtype, expect_positive, expect_shape
from longctx_layers.ops.dispatch import Operation
from longctx_layers.ops.segments import Segments, cover, range_start, shortened

_FULL_BLOCK = 256  # queries that full attention with segments or cached keys handles at a time


class FarKeys(NamedTuple):
    """Keys that queries see besides their range, matched by content: a list per block of queries.

    Attributes:
        q: `[B, H, T, P]`, the queries that match them (without rotary embedding).
        k, v: `[B, G, L, F, P]`: list l serves the queries `[l * block, (l + 1) * block)`.
        mask: `[B or 1, G or 1, T, F]` bool, True where the query sees the key of its list.
        block: queries per list; L = ceil(T / block).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    block: int


_operation = Operation("sparse_attention")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None = None,
    chunk_size: int | None = None,
    chunk_shift: int = 0,
    segments: Segments | None = None,
    far: FarKeys | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention in which query i sees one contiguous range of keys and a list of far ones.

    The range ends at the query itself. It begins at the first token of the query's segment, and
    not before: `i - window_size + 1` (a window of W keys includes the query's own), or the first
    token of the query's chunk, `floor((p - chunk_shift) / chunk_size)` for position p in the
    segment. With neither, attention is full. One softmax runs over the range and the far keys.

    Args:
        q: queries `[B, H, T, P]`.
        k, v: keys and values `[B, G, S, P]`, G dividing H (grouped queries: query head h reads
            key head `h // (H / G)`). The last T belong to the queries; the S - T before them are
            cached from earlier calls. With a window or a chunk of W keys, W - 1 of them suffice.
        window_size: number of keys in the window, at least 1.
        chunk_size: number of tokens in a chunk, at least 1.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`.
        segments: where segments begin and rows end; None for one segment of T real tokens
            (cached keys then belong to it, and chunks count from the call's first token).
        far: keys outside the range (global, random, memory); the caller leaves out of its mask
            whatever lies inside the range.
        dropout_p: probability with which attention weights are dropped.
        scale: factor on the scores, `P ** -0.5` by default.
        backend: see `longctx_layers.explain`.

    Returns:
        `[B, H, T, P]` in q's dtype. Softmax runs in float32 at least.

    Raises:
        ValueError, TypeError: for shapes, dtypes or sizes that do not fit.

    Source: Beltagy et al., Longformer, arXiv 2004.05150; Zaheer et al., BigBird, 2007.14062.
    """
    _check(q, k, v, window_size, chunk_size, chunk_shift, segments, far, dropout_p)
    result: Tensor = _operation(
        q,
        k,
        v,
        window_size=window_size,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        segments=segments,
        far=far,
        dropout_p=dropout_p,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        backend=backend,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | None,
    chunk_size: int | None,
    chunk_shift: int,
    segments: Segments | None,
    far: FarKeys | None,
    dropout_p: float,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, P], got a tensor of shape {list(q.shape)}")
    batch, heads, length, dim = q.shape
    expect_shape("k", k, (batch, None, None, dim), "[B, G, S, P]")
    expect_shape("v", v, tuple(k.shape), "[B, G, S, P], as k")
    expect_dtype("k", k, q.dtype)
    expect_dtype("v", v, q.dtype)
    if heads % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}; "
            "repeat or regroup the heads"
        )
    if k.shape[2] < length:
        raise ValueError(
            f"k: expected at least the {length} keys of the queries themselves, got {k.shape[2]}; "
            "cached keys stand before them"
        )
    for name, value in (("window_size", window_size), ("chunk_size", chunk_size)):
        if value is not None:
            expect_positive(name, value)
    if chunk_shift and not (chunk_size is not None and 0 <= chunk_shift < chunk_size):
        raise ValueError(
            f"chunk_shift: expected 0 <= chunk_shift < chunk_size ({chunk_size}), got {chunk_shift}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if segments is not None:
        expect_shape("segments.start", segments.start, (batch, length), "[B, T]")
        expect_shape("segments.length", segments.length, (batch,), "[B]")
    if far is not None:
        lists = -(-length // far.block)
        if lists > 1 and window_size is None and chunk_size is None:
            raise ValueError(
                f"far: expected one list of far keys for full attention, got {lists}; "
                "lists for blocks of queries need a window or a chunk"
            )
        expect_shape("far.q", far.q, tuple(q.shape), "[B, H, T, P], as q")
        expect_shape("far.k", far.k, (batch, k.shape[1], lists, None, dim), "[B, G, L, F, P]")
        expect_shape("far.v", far.v, tuple(far.k.shape), "[B, G, L, F, P], as far.k")
        expect_shape("far.mask", far.mask, (None, None, length, far.k.shape[3]), "[B, G, T, F]")


@_operation.register("torch")
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None,
    chunk_size: int | None,
    chunk_shift: int,
    segments: Segments | None,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """The range cut into blocks of queries, each with the keys that the block can reach."""
    length, prefix = q.shape[2], k.shape[2] - q.shape[2]
    sizes = [n for n in (window_size, chunk_size) if n is not None]
    reach = shortened(min(sizes), k.shape[2]) if sizes else k.shape[2]
    any_length = bool(sizes) and torch.compiler.is_exporting()
    plain = segments is None and prefix == 0 and far is None
    if plain and not any_length and reach >= length and chunk_shift == 0:
        return _scaled_dot_product(q, k, v, None, True, dropout_p, scale)
    if plain and window_size is None and chunk_size is not None:
        return _aligned_chunks(q, k, v, chunk_size, chunk_shift, dropout_p, scale)
    first = range_start(
        length,
        segments,
        prefix=prefix,
        window_size=window_size,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        device=q.device,
    )
    if window_size is None and chunk_size is None:
        return _full(q, k, v, first, far, dropout_p, scale)
    block = min(128, max(16, 1 << (reach - 1).bit_length()))
    if far is not None and far.k.shape[2] > 1:
        block = far.block
    if not any_length and length <= block:
        keys = min(k.shape[2], length + reach - 1)
        return _one_block(q, k[:, :, -keys:], v[:, :, -keys:], first, 0, far, dropout_p, scale)
    return _blocks(q, k, v, first, block, reach, far, dropout_p, scale)


def _scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _aligned_chunks(
    q: Tensor, k: Tensor, v: Tensor, size: int, shift: int, dropout_p: float, scale: float
) -> Tensor:
    """Chunks as the batch dimension of one causal attention; no mask at all."""
    if shift:
        # The tokens before the first whole chunk are a chunk of their own.
        pieces = []
        for part, whole in ((slice(shift), shift), (slice(shift, None), size)):
            queries, keys, values = (x[:, :, part] for x in (q, k, v))
            if queries.shape[2]:
                pieces.append(_aligned_chunks(queries, keys, values, whole, 0, dropout_p, scale))
        return torch.cat(pieces, dim=2)
    batch, length = q.shape[0], q.shape[2]
    chunks = cover(length, size)

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, chunks * size - length))
        return x.unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1)

    y = _scaled_dot_product(split(q), split(k), split(v), None, True, dropout_p, scale)
    return y.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """All earlier keys, a block of queries at a time, so that no mask of T x S ever exists."""
    length, prefix = q.shape[2], k.shape[2] - q.shape[2]
    outputs = []
    for low in range(0, length, _FULL_BLOCK):
        high = min(low + _FULL_BLOCK, length)
        part = far
        if far is not None:
            part = far._replace(q=far.q[:, :, low:high], mask=far.mask[:, :, low:high])
        keys, values = k[:, :, : prefix + high], v[:, :, : prefix + high]
        arguments = (q[:, :, low:high], keys, values, first[:, low:high], low, part)
        if torch.is_grad_enabled() and length > _FULL_BLOCK:
            # Recomputed in the backward: what the blocks keep would add up to T x S.
            y = checkpoint(_one_block, *arguments, dropout_p, scale, use_reentrant=False)
        else:
            y = _one_block(*arguments, dropout_p, scale)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


def _one_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    index: int,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Queries from the given index on, over keys that end with the last of them."""
    end = index + q.shape[2]
    i = torch.arange(index, end, device=q.device)[:, None]
    j = torch.arange(end - k.shape[2], end, device=q.device)
    mask = (j >= first[..., None]) & (j <= i)
    if far is not None:
        far = far._replace(k=far.k[:, :, 0], v=far.v[:, :, 0])
    return _attend(q, k, v, mask[:, None], far, dropout_p, scale)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    block: int,
    reach: int,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """All blocks at once: each sees the keys of its own block and of the few before it."""
    batch, length, prefix = q.shape[0], q.shape[2], k.shape[2] - q.shape[2]
    blocks, before = cover(length, block), -(-(reach - 1) // block)
    pad = blocks * block - length

    def cut(x: Tensor) -> Tensor:  # [B, h, T, P] -> [B * blocks, h, block, P]
        x = F.pad(x, (0, 0, 0, pad)).unflatten(2, (blocks, block))
        return x.transpose(1, 2).flatten(0, 1)

    def gather(x: Tensor) -> Tensor:  # [B, G, S, P] -> [B * blocks, G, (before + 1) * block, P]
        # Copies of whole blocks: their backward is a plain addition, an unfold's is not.
        x = F.pad(x, (0, 0, before * block - prefix, pad)).unflatten(2, (before + blocks, block))
        shifted = [x[:, :, n : n + blocks] for n in range(before + 1)]
        return torch.cat(shifted, dim=3).transpose(1, 2).flatten(0, 1)

    def lists(x: Tensor) -> Tensor:  # [B, G, L, F, P] -> [B * blocks, G, F, P]
        if x.shape[2] > 1:
            x = F.pad(x, (0, 0, 0, 0, 0, blocks - x.shape[2]))
        return x.expand(-1, -1, blocks, -1, -1).transpose(1, 2).flatten(0, 1)

    def rows(x: Tensor) -> Tensor:  # [b, h, T, F] -> [B * blocks, h, block, F]
        # As integers: for a padded bool, inductor's CPU backend writes C++ that does not compile.
        x = F.pad(x.to(torch.int32), (0, 0, 0, pad)).bool().unflatten(2, (blocks, block))
        return x.expand(batch, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)

    # Queries that pad the last block see some keys too: no row is ever empty.
    i = torch.arange(blocks * block, device=q.device).unflatten(0, (blocks, block))
    j = i[:, :1] + torch.arange(-before * block, block, device=q.device)
    first = F.pad(first, (0, pad)).unflatten(1, (blocks, block))
    mask = (j[:, None] >= first[..., None]) & (j[:, None] <= i[..., None])
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    if far is not None:
        far = FarKeys(cut(far.q), lists(far.k), lists(far.v), rows(far.mask), block)
    y = _attend(cut(q), gather(k), gather(v), mask, far, dropout_p, scale)
    return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Attention under a mask `[B or 1, 1, T, S]`; `far.k` and `far.v` are `[B, G, F, P]` here.

    The query heads of a group are folded into the query length, so that no key is copied.
    """
    groups, share, length = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]

    def fold(x: Tensor) -> Tensor:  # [B, H or G or 1, T, F] -> [B, G or 1, share * T, F]
        if x.shape[1] == groups * share:
            return x.unflatten(1, (groups, share)).flatten(2, 3)
        return x.repeat(1, 1, share, 1) if share > 1 else x

    if far is None:
        y = _scaled_dot_product(fold(q), k, v, fold(mask), False, dropout_p, scale)
    else:
        precise = torch.promote_types(q.dtype, torch.float32)
        near = (fold(q).to(precise) * scale) @ k.to(precise).mT
        near = near.masked_fill(~fold(mask), -math.inf)
        distant = (fold(far.q).to(precise) * scale) @ far.k.to(precise).mT
        distant = distant.masked_fill(~fold(far.mask), -math.inf)
        weights = F.dropout(torch.cat([near, distant], dim=-1).softmax(-1), dropout_p)
        near, distant = weights.split([k.shape[2], far.k.shape[2]], dim=-1)
        y = (near @ v.to(precise) + distant @ far.v.to(precise)).to(q.dtype)
    return y.unflatten(2, (share, length)).flatten(1, 2)


_operation.register("reference")(reference.sparse_attention)
