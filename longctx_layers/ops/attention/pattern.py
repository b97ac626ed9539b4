"""The pattern of sparse attention: the range of keys that each query sees, for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx_layers.ops.segments import Segments, chunk_start


class Pattern(NamedTuple):
    """Each query sees the contiguous range of keys `[first_key, i]`, i being its own index.

    Indices count from the call's first token; cached keys of earlier calls have negative ones.

    Attributes:
        window_size: the most keys in a range, the query's own included; None for no limit.
        chunk_size: tokens in a chunk, before which no range begins; None for no chunks.
        chunk_shift: where the first whole chunk of a segment begins.
        segments: where segments begin; None for one segment, which all cached keys belong to and
            whose chunks count from the call's first token.

    >>> import torch
    >>> Pattern(window_size=3).first_key(5, 0, torch.device("cpu"))
    tensor([[0, 0, 0, 1, 2]])
    >>> Pattern(chunk_size=2).first_key(5, 0, torch.device("cpu"))
    tensor([[0, 0, 2, 2, 4]])
    """

    window_size: int | None = None
    chunk_size: int | None = None
    chunk_shift: int = 0
    segments: Segments | None = None

    def first_key(self, length: int, prefix: int, device: torch.device) -> Tensor:
        """The first key of each query's range, for `length` queries after `prefix` cached keys.

        Returns:
            `[1, T]` or `[B, T]` int64, never falling along a row and at least `-prefix`, the first
            cached key.
        """
        index = torch.arange(length, device=device)[None]
        if self.segments is None:
            first = index.new_full((1, 1), -prefix)
            origin: Tensor | int = 0
        else:
            first = origin = self.segments.start
        if self.window_size is not None:
            first = torch.maximum(first, index - (self.window_size - 1))
        if self.chunk_size is not None:
            start = chunk_start(index, origin, self.chunk_size, self.chunk_shift)
            first = torch.maximum(first, start)
        return first.clamp(min=-prefix).expand(-1, length)

    def reach(self) -> int | None:
        """The most keys that a query can see, None for all earlier ones of its segment."""
        if self.window_size is None:
            return self.chunk_size
        if self.chunk_size is None:
            return self.window_size
        return min(self.window_size, self.chunk_size)
