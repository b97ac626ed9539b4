"""Sparse attention in plain torch, with the queries cut into blocks.

Each block is multiplied with just the keys that it can reach, so that the cost is linear in the
length. All blocks run as one batch of dense products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.attention.pattern import Pattern
from longctx_layers.ops.operation import forward_mode, transformed
from longctx_layers.ops.second_order import twice_differentiable
from longctx_layers.ops.segments import clip_tile, cover

_FULL_BLOCK = 256  # queries at a time in full attention with segments or cached keys


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """`longctx_layers.ops.sparse_attention` in plain torch."""
    length = q.shape[2]
    prefix = k.shape[2] - length
    limit = pattern.reach()
    reach = k.shape[2] if limit is None else clip_tile(limit, k.shape[2])
    # An exported program with a window or chunks serves every length.
    any_length = torch.compiler.is_exporting() and limit is not None
    plain = pattern.segments is None and prefix == 0 and far is None
    if plain and not any_length and reach >= length and pattern.chunk_shift == 0:
        return _scaled_dot_product(q, k, v, None, True, dropout_p, scale)
    if plain and pattern.window_size is None and pattern.chunk_size is not None:
        size, shift = pattern.chunk_size, pattern.chunk_shift
        return _aligned_chunks(q, k, v, size, shift, dropout_p, scale)
    first = pattern.first_key(length, prefix, q.device)
    if limit is None:
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
    """Attention under a mask that broadcasts to `[B, H, T, S]`, or a causal one."""
    options = {"dropout_p": dropout_p, "scale": scale}
    if not torch.compiler.is_compiling():
        # The fused kernels have neither second nor forward-mode derivatives. On a CPU they have no
        # dropout either: torch itself composes attention there.
        drops = dropout_p > 0 and q.device.type == "cpu"
        if drops or forward_mode() or (torch.is_grad_enabled() and transformed()):
            return _composed(q, k, v, mask, causal, **options)
    y: Tensor = twice_differentiable(_fused, _composed, q, k, v, mask, causal, **options)
    return y


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    *,
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


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    *,
    dropout_p: float,
    scale: float,
) -> Tensor:
    precise = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[1]
    queries = q.to(precise).unflatten(1, (groups, -1)) * scale  # [B, G, H / G, T, P]
    scores = queries @ k.to(precise)[:, :, None].mT
    if causal:
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    elif mask is not None and mask.dim() == 4:
        mask = mask.expand(-1, q.shape[1], -1, -1).unflatten(1, (groups, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return (weights @ v.to(precise)[:, :, None]).flatten(1, 2).to(q.dtype)


def _aligned_chunks(
    q: Tensor, k: Tensor, v: Tensor, size: int, shift: int, dropout_p: float, scale: float
) -> Tensor:
    """Chunks as the batch dimension of one causal attention, without any mask."""
    if shift:
        # The tokens before the first whole chunk are a chunk of their own.
        pieces = []
        for part, whole in ((slice(shift), shift), (slice(shift, None), size)):
            queries, keys, values = (x[:, :, part] for x in (q, k, v))
            if queries.shape[2]:
                pieces.append(_aligned_chunks(queries, keys, values, whole, 0, dropout_p, scale))
        return torch.cat(pieces, dim=2)
    batch = q.shape[0]
    length = q.shape[2]
    chunks = cover(length, size)

    def split(x: Tensor) -> Tensor:  # [B, h, T, P] -> [B * chunks, h, size, P]
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
    """All earlier keys, for a block of queries at a time, so that no T x S mask ever exists."""
    length = q.shape[2]
    prefix = k.shape[2] - length
    outputs = []
    for low in range(0, length, _FULL_BLOCK):
        high = min(low + _FULL_BLOCK, length)
        part = far
        if far is not None:
            part = far._replace(q=far.q[:, :, low:high], mask=far.mask[:, :, low:high])
        keys, values = k[:, :, : prefix + high], v[:, :, : prefix + high]
        arguments = (q[:, :, low:high], keys, values, first[:, low:high], low, part)
        if torch.is_grad_enabled() and length > _FULL_BLOCK:
            # Recomputed in the backward pass: saved scores of all blocks would add up to T x S.
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
    """Queries from the given index on; the last of the keys is the last query's own."""
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
    batch = q.shape[0]
    length = q.shape[2]
    prefix = k.shape[2] - length
    blocks = cover(length, block)
    before = -(-(reach - 1) // block)
    pad = blocks * block - length

    def cut(x: Tensor) -> Tensor:  # [B, h, T, P] -> [B * blocks, h, block, P]
        x = F.pad(x, (0, 0, 0, pad)).unflatten(2, (blocks, block))
        return x.transpose(1, 2).flatten(0, 1)

    def gather(x: Tensor) -> Tensor:  # [B, G, S, P] -> [B * blocks, G, (before + 1) * block, P]
        # Copies of whole blocks: unlike that of an unfold, their backward is a plain addition.
        x = F.pad(x, (0, 0, before * block - prefix, pad)).unflatten(2, (before + blocks, block))
        shifted = [x[:, :, n : n + blocks] for n in range(before + 1)]
        return torch.cat(shifted, dim=3).transpose(1, 2).flatten(0, 1)

    def lists(x: Tensor) -> Tensor:  # [B, G, L, F, P] -> [B * blocks, G, F, P]
        if x.shape[2] > 1:
            x = F.pad(x, (0, 0, 0, 0, 0, blocks - x.shape[2]))
        return x.expand(-1, -1, blocks, -1, -1).transpose(1, 2).flatten(0, 1)

    def rows(x: Tensor) -> Tensor:  # [b, h, T, F] -> [B * blocks, h, block, F]
        # As integers: for a padded bool, inductor's CPU backend writes invalid C++.
        x = F.pad(x.to(torch.int32), (0, 0, 0, pad)).bool().unflatten(2, (blocks, block))
        return x.expand(batch, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)

    # Padding queries in the last block see some keys too, so that no row is empty.
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
    groups = k.shape[1]
    share = q.shape[1] // groups
    length = q.shape[2]

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
