"""Documents of many lengths in few rows: what others pass instead of segment ids, and back.

segment_ids   [B, T], equal in a document, negative at pads: what the layers take
cu_seqlens    [n + 1], where documents begin and end in one long row: flash-attn's
position_ids  [B, T], a token's place in its document: what restarts at a new one
attention_mask  [B, T], 0 at pads and 1 elsewhere
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.checks import expect_count, expect_shape
from longctx_layers.ops.segments import PAD_SEGMENT


class CuSeqlens(NamedTuple):
    """Rows with their pads taken out, as one long row.

    Attributes:
        cu_seqlens: `[n + 1]` int32, cumulative lengths of the n documents, from 0 on.
        max_seqlen: tokens of the longest document; 0 without any.
        indices: `[N]` int64, where in the flattened `[B * T]` rows the N real tokens stand: with
            x `[B, T, D]`, `x.flatten(0, 1)[indices]` is the long row, `[N, D]`.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor


def segment_ids_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Number the documents of one long row: 0, 1, 2, ...

    Args:
        cu_seqlens: `[n + 1]` integers, n >= 0: 0, then where each document ends; never falling.
            An empty document takes a number and no token.
        length: tokens of the row; those behind the last document are pads. By default the row ends
            with its last document. To give it costs a GPU no synchronisation, but then nothing
            checks that cu_seqlens begins at 0, rises and ends within the row.

    Returns:
        `[1, length]` int64, -1 at pads.

    Raises:
        ValueError, TypeError: for a shape, dtype or order that does not fit.
    """
    expect_shape("cu_seqlens", cu_seqlens, (None,), "[n + 1]")
    _expect_integers("cu_seqlens", cu_seqlens)
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected at least its first 0, got no element; pass [0]")
    if length is not None:
        expect_count("length", length)
    known = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if length is None or known:
        length = _checked_length(cu_seqlens.tolist(), length)
    index = torch.arange(length, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long()
    ids = torch.searchsorted(ends, index, right=True)
    return torch.where(ids < len(ends), ids, PAD_SEGMENT)[None]


def cu_seqlens_from_segment_ids(segment_ids: Tensor) -> CuSeqlens:
    """Take the pads out of rows, and say where their documents begin and end.

    A document is a run of equal ids of one row, pads within it left out. Synchronises a GPU: how
    many documents there are is a shape.

    Args:
        segment_ids: `[B, T]` integers, negative at pads.

    Raises:
        ValueError, TypeError: for a shape or dtype that does not fit.
    """
    _check_rows("segment_ids", segment_ids)
    index = (segment_ids.flatten() >= 0).nonzero().squeeze(1)
    row = index // max(segment_ids.shape[1], 1)
    key = torch.stack([row, segment_ids.flatten()[index].long()])
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[1:] = (key[:, 1:] != key[:, :-1]).any(0)
    bounds = torch.cat([begins.nonzero().squeeze(1), index.new_full((1,), len(index))])
    longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
    return CuSeqlens(bounds.to(torch.int32), longest, index)


def segment_ids_from_position_ids(
    position_ids: Tensor, held: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Number the documents of each row: a new one begins wherever positions do not go up by one.

    Only real tokens are compared. Pads between two tokens of a document may count as positions or
    not: both conventions are in use.

    Args:
        position_ids: `[B, T]` integers.
        held: `[B]` integers, the ids of the segments that the rows' states are in, negative for
            none: they continue, unless the first real token here has position 0. None for rows
            that begin.
        attention_mask: `[B, T]`, 0 at pads, whose positions mean nothing. None without pads.

    Returns:
        `[B, T]` int64; the ids go up from the held ones, or from 0; -1 at pads.

    Raises:
        ValueError, TypeError: for a shape or dtype that does not fit.
    """
    _check_rows("position_ids", position_ids)
    if attention_mask is None:
        real = torch.ones_like(position_ids, dtype=torch.bool)
    else:
        expect_shape("attention_mask", attention_mask, tuple(position_ids.shape), "[B, T]")
        real = attention_mask != 0
    before = _real_before(real)
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    distance = torch.arange(position_ids.shape[1], device=position_ids.device) - before
    begins = (before >= 0) & ((step < 1) | (step > distance))
    first = torch.zeros_like(before[:, :1])
    if held is not None:
        first = held[:, None]
        begins |= (before < 0) & (position_ids == 0) & (first >= 0)
    ids = first.clamp(min=0) + (begins & real).cumsum(1)
    return ids.masked_fill(~real, PAD_SEGMENT)


def position_ids_from_segment_ids(segment_ids: Tensor) -> Tensor:
    """A token's place in its document, `[B, T]` int64, from 0 on; pads don't count, and get 0.

    Args:
        segment_ids: `[B, T]` integers, negative at pads.

    Raises:
        ValueError, TypeError: for a shape or dtype that does not fit.
    """
    _check_rows("segment_ids", segment_ids)
    real = segment_ids >= 0
    place = real.cumsum(1) - 1
    before = _real_before(real)
    earlier = segment_ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, PAD_SEGMENT)
    begins = real & (earlier != segment_ids)
    start = torch.where(begins, place, 0).cummax(1).values
    return torch.where(real, place - start, 0)


def segment_ids_from_attention_mask(attention_mask: Tensor, held: Tensor | None = None) -> Tensor:
    """One document a row, with its pads anywhere: -1 where the mask is 0.

    Args:
        attention_mask: `[B, T]`, integers or bool.
        held: `[B]` integers, the ids of the segments that the rows' states are in and go on with,
            negative for none. None for rows that begin.

    Returns:
        `[B, T]` int64: the held id, or 0, at real tokens.

    Raises:
        ValueError: for a mask of another shape, as a 4-D one that says what each token sees, or
            one that numbers documents.
    """
    expect_shape("attention_mask", attention_mask, (None, None), "[B, T]")
    if not torch.compiler.is_compiling():
        expect_zeros_and_ones(attention_mask, bool(is_binary(attention_mask)))
    ids = attention_mask.new_zeros(len(attention_mask), 1, dtype=torch.int64)
    if held is not None:
        ids = held.clamp(min=0)[:, None].long()
    return torch.where(attention_mask != 0, ids, PAD_SEGMENT)


def is_binary(attention_mask: Tensor) -> Tensor:
    """Whether a mask has nothing but 0 and 1, a scalar tensor."""
    return ((attention_mask == 0) | (attention_mask == 1)).all()


def expect_zeros_and_ones(attention_mask: Tensor, binary: bool) -> None:
    """Raise ValueError for a mask that is not binary."""
    if not binary:
        raise ValueError(
            "attention_mask: expected 0 at pads and 1 elsewhere, got values from "
            f"{attention_mask.min().item()} to {attention_mask.max().item()}; if they number "
            "documents, pass segment_ids instead (negative at pads)"
        )


def _real_before(real: Tensor) -> Tensor:
    """The last real column before each column, `[B, T]`; -1 for none."""
    column = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, column, -1).cummax(1).values
    return F.pad(last, (1, 0), value=-1)[:, : len(column)]


def _checked_length(bounds: list[int], length: int | None) -> int:
    if bounds[0] != 0 or bounds != sorted(bounds) or (length is not None and bounds[-1] > length):
        within = "" if length is None else f" and stay within {length}"
        raise ValueError(
            f"cu_seqlens: expected numbers that begin with 0, never fall{within}, got "
            f"{bounds[:20]}; pass the cumulative sum of the lengths with a 0 before it"
        )
    return bounds[-1] if length is None else length


def _check_rows(name: str, x: Tensor) -> None:
    expect_shape(name, x, (None, None), "[B, T]")
    _expect_integers(name, x)


def _expect_integers(name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}; convert it with .long()")
