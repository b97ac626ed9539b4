"""Keys outside the range of their queries: global, random and memory keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx_layers.ops.segments import Segments

RANDOM_BLOCK = 64  # queries that share one set of random keys


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

    def split(self, sizes: list[int]) -> list[FarKeys]:
        """Those of consecutive queries, each piece but the last a multiple of `block` long."""
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

    With segments, a block must not be longer than the window: then all of its queries that lie
    far enough behind a global token belong to the segment of the block's first query.
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

    Without segments, the one of all rows began `offset` tokens before these.
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
    """The random keys of query blocks: a pure function of seed, head and block.

    Block b holds the queries at positions [64 b, 64 b + 64) of a segment. Its candidates are the
    positions from `n_global_tokens` to `64 b - window_size`, cut into n equal strata; a hash
    (Murmur3's finaliser, chained over seed, head, block and stratum) picks one of each. With fewer
    candidates than n, every one of them is picked.

    Args:
        block: numbers b of the blocks, int64, any shape `[...]`.

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
    """Global and random keys out of k and v that hold the whole history (BigBird).

    Args:
        q: queries `[B, H, T, P]`, without rotary embedding.
        k, v: `[B, G, S, P]`, without rotary embedding; the last T belong to the queries.
    """
    if n_global_tokens + n_random_tokens == 0:
        return None
    (batch, heads, total, _), length = k.shape, q.shape[2]
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
