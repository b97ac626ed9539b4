"""Segments of packed rows: where each token's segment begins, and where rows end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAD_SEGMENT = -1  # any negative segment id marks padding


class Segments(NamedTuple):
    """Where each token's segment begins, for rows that are padded on the right, if at all.

    All indices count from the call's first token; tokens of earlier calls have negative ones.

    Attributes:
        start: `[B, T]` int64, the index of the first token of each token's segment. A segment
            that began in an earlier call has a negative start; a token whose start is its own
            index begins a segment. Padding repeats the start of the row's last real token.
        length: `[B]` int64, the number of real tokens of each row. What an operation returns for
            the padding after them is unspecified but finite, and padding never changes a state.
        packed: False promises that every row continues one segment, without any padding.

    >>> import torch
    >>> segments = Segments(torch.tensor([[0, 0, 2, 2]]), torch.tensor([3]))
    >>> segments.real()
    tensor([[ True,  True,  True, False]])
    """

    start: Tensor
    length: Tensor
    packed: bool = True

    def real(self) -> Tensor:
        """`[B, T]` bool: True at real tokens, False at padding."""
        index = torch.arange(self.start.shape[1], device=self.start.device)
        return index < self.length[:, None]

    def part(self, first: int, count: int) -> Segments:
        """Those of the `count` tokens from `first` on, with indices that count from there."""
        # In a row that has ended, the next token follows the row's last real one, not the padding.
        start = self.start[:, first : first + count] - self.length.clamp(max=first)[:, None]
        return Segments(start, (self.length - first).clamp(0, count), self.packed)

    def next_start(self) -> Tensor:
        """`[B]`: the start that a token right after the row's last real one would have."""
        last = (self.length - 1).clamp(min=0)[:, None]
        return self.start.gather(1, last).squeeze(1)


def cover(length: int, size: int) -> int:
    """The number of tiles of `size` tokens that cover `length` tokens.

    During export it is two more than the number of full tiles: the exported program must serve
    every length, so neither a single tile nor an exactly full last one may be a special case.

    >>> cover(10, 4)
    3
    """
    return length // size + 2 if torch.compiler.is_exporting() else -(-length // size)


def clip_tile(size: int, length: int) -> int:
    """The size of tiles for `length` tokens, which need no longer ones (except during export)."""
    return size if torch.compiler.is_exporting() else min(size, length)


def chunk_start(index: Tensor, start: Tensor | int, chunk_size: int, chunk_shift: int) -> Tensor:
    """The index at which the chunk of the token at `index` begins, not clipped to the segment.

    A token at position p = index - start of its segment lies in chunk floor((p - shift) / size).
    """
    return index - (index - start - chunk_shift) % chunk_size
