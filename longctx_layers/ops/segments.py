"""Where each token's segment begins: the one thing every operation needs to know of packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAD_SEGMENT = -1  # any negative segment id marks padding


class Segments(NamedTuple):
    """Segments of a batch whose pads, if any, stand at the right of each row.

    All indices count from the call's first token; tokens of earlier calls have negative ones.

    Attributes:
        start: `[B, T]` int64, the index of the first token of each token's segment. A segment
            that began in an earlier call has a negative start; a token whose start is its own
            index begins a segment. Pads repeat the start of the row's last real token.
        length: `[B]` int64, the number of real tokens of each row. What an operation returns at
            the pads behind them is unspecified but finite, and pads never touch a state.
        packed: False promises that every row goes on with one segment, without any pad.
    """

    start: Tensor
    length: Tensor
    packed: bool = True

    def real(self) -> Tensor:
        """`[B, T]` bool: True at real tokens, False at pads."""
        index = torch.arange(self.start.shape[1], device=self.start.device)
        return index < self.length[:, None]

    def part(self, first: int, count: int) -> Segments:
        """Of the `count` tokens from `first` on, with indices that count from there."""
        # A row that ended earlier: its next token stands at its end, not behind the pads.
        start = self.start[:, first : first + count] - self.length.clamp(max=first)[:, None]
        return Segments(start, (self.length - first).clamp(0, count), self.packed)

    def next_start(self) -> Tensor:
        """`[B]`: the start that a token right behind the row's last real one would have."""
        last = (self.length - 1).clamp(min=0)[:, None]
        return self.start.gather(1, last).squeeze(1)


def cover(length: int, size: int) -> int:
    """How many tiles of `size` tokens cover `length` tokens.

    While exporting two more than are full: an exported program serves every length, and neither a
    single tile nor a full last one may be a case of its own.
    """
    return length // size + 2 if torch.compiler.is_exporting() else -(-length // size)


def shortened(size: int, length: int) -> int:
    """The size of tiles for `length` tokens, which need no longer ones (but while exporting)."""
    return size if torch.compiler.is_exporting() else min(size, length)


def chunk_start(index: Tensor, start: Tensor | int, chunk_size: int, chunk_shift: int) -> Tensor:
    """The index at which the chunk of the token at `index` begins, not clipped to the segment.

    A token at position p = index - start of its segment lies in chunk floor((p - shift) / size).
    """
    return index - (index - start - chunk_shift) % chunk_size


def range_start(
    length: int,
    segments: Segments | None,
    *,
    prefix: int,
    window_size: int | None,
    chunk_size: int | None,
    chunk_shift: int,
    device: torch.device,
) -> Tensor:
    """First key of the contiguous range `[range_start, i]` that query i sees.

    Returns:
        `[1, T]` or `[B, T]` int64; never before the first cached key, `-prefix`.
    """
    index = torch.arange(length, device=device)[None]
    # Without segments, all cached keys belong to the queries' one segment, which for chunks
    # counts its positions from the call's first token.
    first = index.new_full((1, 1), -prefix) if segments is None else segments.start
    origin = 0 if segments is None else segments.start
    if window_size is not None:
        first = torch.maximum(first, index - (window_size - 1))
    if chunk_size is not None:
        first = torch.maximum(first, chunk_start(index, origin, chunk_size, chunk_shift))
    return first.clamp(min=-prefix).expand(-1, length)
