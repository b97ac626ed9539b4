"""Far keys: global, random and memory keys outside the local range, and attention over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from longctx_layers.ops.segments import Segments

RANDOM_BLOCK = 64  # queries that share one set of random keys


class FarKeys(NamedTuple):
    """Extra keys outside the local range: global, random or memory tokens.

    Each run of `block` consecutive queries shares one list of them. Scores use queries and keys
    without rotary embedding, so that they match by content alone.

    Attributes:
        q: `[B, H, T, P]`, the queries without rotary embedding.
        k, v: `[B, G, L, F, P]`, lists of F keys and values: list l is for the queries
            `[l * block, (l + 1) * block)`.
        mask: `[B or 1, G or 1, T, F]` bool, True where the query sees the key of its list.
        block: queries per list; L = ceil(T / block).

    One memory token that all 8 queries see besides their window of 4 keys:

    >>> import torch
    >>> from longctx_layers.ops import FarKeys, sparse_attention
    >>> q, k, v = torch.randn(3, 1, 2, 8, 16)
    >>> memory = torch.randn(1, 2, 1, 1, 16)
    >>> far = FarKeys(q, memory, memory, torch.ones(1, 1, 8, 1, dtype=torch.bool), block=8)
    >>> sparse_attention(q, k, v, window_size=4, far=far).shape
    torch.Size([1, 2, 8, 16])
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    block: int

    def split(self, sizes: list[int]) -> list[FarKeys]:
        """Split by queries; every size but the last must be a multiple of `block`."""
        lists = [-(-size // self.block) for size in sizes]
        pieces = zip(
            self.q.split(sizes, 2),
            self.k.split(lists, 2),
            self.v.split(lists, 2),
            self.mask.split(sizes, 2),
            strict=True,
        )
        return [FarKeys(*piece, self.block) for piece in pieces]


def far_block(window_size: int, segments: Segments | None) -> int:
    """Queries per list of far keys.

    With segments, a block must not be longer than the window. Then every query of the block that is
    more than a window away from a global token is in the segment of the block's first query.
    """
    if segments is None:
        return RANDOM_BLOCK
    return min(RANDOM_BLOCK, 1 << (window_size.bit_length() - 1))


def list_starts(segments: Segments, block: int) -> Tensor:
    """`[B, L]`: where the segment of each block's first query begins."""
    return segments.start[:, ::block]


def global_mask(
    n_global_tokens: int,
    window_size: int,
    length: int,
    segments: Segments | None,
    block: int,
    device: torch.device,
    offset: int = 0,
) -> Tensor:
    """`[B or 1, 1, T, n]`: global tokens of the query's segment that its window does not reach.

    Without segments, every row is one segment, which began `offset` tokens before these.
    """
    index = torch.arange(length, device=device)[:, None]
    token = torch.arange(n_global_tokens, device=device)
    if segments is None:
        return (token <= index + (offset - window_size))[None, None]
    start = list_starts(segments, block).repeat_interleave(block, 1)[:, :length, None]
    own = start == segments.start[..., None]
    return (own & (start + token <= index - window_size))[:, None]


def random_positions(
    block: Tensor,
    n_random_tokens: int,
    n_kv_heads: int,
    *,
    window_size: int,
    n_global_tokens: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Positions of the random keys of blocks of queries: a pure function of seed, head and block.

    Block b holds the queries at positions [64 b, 64 b + 64) of a segment. Its candidates are the
    positions from `n_global_tokens` to `64 b - window_size`, cut into n equal strata; a hash
    (Murmur3's finaliser, chained over seed, head, block and stratum) picks one position of each.
    With fewer candidates than n, all of them are picked.

    Args:
        block: numbers b of the blocks, int64 of any shape `[...]`.

    Returns:
        Positions `[G, ..., n]` int64 and whether they exist, bool, of the same shape.

    Source: Zaheer et al., BigBird, arXiv 2007.14062 (random blocks; here single keys, causal).
    """
    head = torch.arange(n_kv_heads, device=block.device).view(-1, *[1] * (block.dim() + 1))
    stratum = torch.arange(n_random_tokens, device=block.device)
    block = block[None, ..., None]
    candidates = (RANDOM_BLOCK * block - window_size - n_global_tokens + 1).clamp(min=0)
    low = candidates * stratum // n_random_tokens
    width = candidates * (stratum + 1) // n_random_tokens - low
    mixed = _mix(torch.full_like(head, (seed + 0x9E3779B9) & 0xFFFFFFFF))
    for part in (head, block, stratum):
        mixed = _mix(mixed ^ part)
    return n_global_tokens + low + (mixed * width >> 32), (width > 0).expand(mixed.shape)


def _mix(h: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser, on int64 values below 2**32."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def far_cached_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    n_global_tokens: int,
    n_random_tokens: int,
    seed: int,
    segments: Segments | None,
) -> FarKeys | None:
    """Global and random keys, gathered from k and v of the whole history (BigBird).

    Args:
        q: queries `[B, H, T, P]`, without rotary embedding.
        k, v: `[B, G, S, P]`, without rotary embedding; the last T belong to the queries.
    """
    if n_global_tokens + n_random_tokens == 0:
        return None
    batch, heads, total, _ = k.shape
    length = q.shape[2]
    block = far_block(window_size, segments)
    token = torch.arange(n_global_tokens, device=q.device)
    index = torch.arange(length, device=q.device)
    masks = [global_mask(n_global_tokens, window_size, length, segments, block, q.device)]
    masks[0] = masks[0].expand(-1, heads, -1, -1)
    if segments is None:
        numbers = index[::block] // RANDOM_BLOCK  # [L]
        start = numbers.new_zeros(1, len(numbers))
        candidates = [numbers[None]]
    else:
        start = list_starts(segments, block)  # [B, L]
        first = (index[::block] - start) // RANDOM_BLOCK
        candidates = [first, first + 1]  # a block of queries lies in two at most
    indices = [(start[:, None, :, None] + token).expand(-1, heads, -1, -1)]
    for number in candidates if n_random_tokens else []:
        position, exists = random_positions(
            number,
            n_random_tokens,
            heads,
            window_size=window_size,
            n_global_tokens=n_global_tokens,
            seed=seed,
        )  # [G, b, L, n]
        indices.append(start[:, None, :, None] + position.transpose(0, 1))
        sees = exists.transpose(0, 1).repeat_interleave(block, 2)[:, :, :length]
        if segments is not None:
            at, where = (x.repeat_interleave(block, 1)[:, :length] for x in (number, start))
            own = (where == segments.start) & ((index - segments.start) // RANDOM_BLOCK == at)
            sees = sees & own[:, None, :, None]
        masks.append(sees)
    gather = torch.cat(indices, dim=-1).flatten(2) + (total - length)
    gather = gather.clamp(0, total - 1).expand(batch, -1, -1)[..., None]
    keys, values = (
        x.gather(2, gather.expand(-1, -1, -1, x.shape[-1])).unflatten(2, (start.shape[1], -1))
        for x in (k, v)
    )
    return FarKeys(q, keys, values, torch.cat(masks, dim=-1), block)


def far_attention(far: FarKeys, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the far keys alone, in float32 at least, to be merged with that of the range.

    Returns:
        Outputs `[B, H, T, P]` and log-sum-exps `[B, H, T]` of the scores. Where a query sees no far
        key both are finite, and the log-sum-exp is so low that `merge` gives the output no weight.
    """
    length = far.q.shape[2]
    groups, lists = far.k.shape[1:3]
    block = far.block if lists > 1 else length
    precise = torch.promote_types(far.q.dtype, torch.float32)
    pad = (0, 0, 0, lists * block - length)
    # The query heads of a group are rows of one product, so that no key is copied.
    to_rows = "b (g share) (lists block) p -> b g lists (share block) p"
    from_rows = "b g lists share block ... -> b (g share) (lists block) ..."
    q = rearrange(F.pad(far.q.to(precise) * scale, pad), to_rows, g=groups, lists=lists)
    scores = (q @ far.k.to(precise).mT).unflatten(3, (-1, block))
    mask = rearrange(
        F.pad(far.mask, pad), "b g (lists block) f -> b g lists 1 block f", lists=lists
    )
    # Not -inf, whose log-sum-exp has no gradient.
    scores = scores.masked_fill(~mask, torch.finfo(precise).min)
    weights = F.dropout(scores.softmax(-1), dropout_p)
    y = (weights.flatten(3, 4) @ far.v.to(precise)).unflatten(3, (-1, block))
    lse = scores.logsumexp(-1)
    return rearrange(y, from_rows)[:, :, :length], rearrange(lse, from_rows)[:, :, :length]


def merge(y: Tensor, lse: Tensor, far_y: Tensor, far_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each.

    Args:
        y, far_y: outputs `[..., P]`.
        lse, far_lse: log-sum-exps `[...]` of the scores.

    Returns:
        The output in y's dtype, and the log-sum-exp of all scores.
    """
    weight = torch.sigmoid(far_lse - lse)[..., None]
    merged = torch.lerp(y.to(weight.dtype), far_y.to(weight.dtype), weight)
    return merged.to(y.dtype), torch.logaddexp(lse, far_lse)
