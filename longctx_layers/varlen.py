"""Documents of many lengths in few rows: what others pass instead of segment ids, and back.

segment_ids   [B, T], equal in a document, negative at pads: what the layers take
cu_seqlens    [n + 1], where documents begin and end in one long row: flash-attn's
position_ids  [B, T], a token's place in its document: what restarts at a new one
attention_mask  [B, T], 0 at pads and 1 elsewhere
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.generation import PAD_SEGMENT
from longctx_layers.ops.checks import expect_count, expect_shape

# The arguments of a call, by transformers' names, that do nothing but tell documents apart.
DOCUMENTS = ("segment_ids", "seq_idx", "cu_seq_lens_q")


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


def segment_ids_from_position_ids(position_ids: Tensor, held: Tensor | None = None) -> Tensor:
    """Number the documents of each row: a new one begins wherever positions do not go up by one.

    Args:
        position_ids: `[B, T]` integers.
        held: `[B]` integers, the ids of the segments that the rows' states are in, negative for
            none: they go on, unless their first position here is 0. None for rows that begin.

    Returns:
        `[B, T]` int64; the ids go up from the held ones, or from 0.

    Raises:
        ValueError, TypeError: for a shape or dtype that does not fit.
    """
    _check_rows("position_ids", position_ids)
    begins = torch.zeros_like(position_ids, dtype=torch.int64)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    if held is None:
        return begins.cumsum(1)
    begins[:, :1] = (position_ids[:, :1] == 0) & (held[:, None] >= 0)
    return held.clamp(min=0)[:, None] + begins.cumsum(1)


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
    # The id of the last real token before each column, or a negative one.
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    last = torch.where(real, column, -1).cummax(1).values
    before = F.pad(last, (1, 0), value=-1)[:, : len(column)]
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
        ValueError: for a mask of another shape, as a 4-D one that says what each token sees.
    """
    expect_shape("attention_mask", attention_mask, (None, None), "[B, T]")
    ids = attention_mask.new_zeros(len(attention_mask), 1, dtype=torch.int64)
    if held is not None:
        ids = held.clamp(min=0)[:, None].long()
    return torch.where(attention_mask != 0, ids, PAD_SEGMENT)


def call_segments(
    shape: tuple[int, int],
    held: Tensor | None,
    seen: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor | None:
    """Segment ids of a call to a model of transformers, from whatever of it says something.

    Documents are told apart by the first of these that is given: segment_ids, seq_idx,
    cu_seq_lens, position_ids. Pads are where attention_mask is 0, or segment_ids negative.

    Args:
        shape: batch and length of the call.
        held: `[B]`, the ids of the segments that the rows' states are in; None to begin.
        seen: columns of earlier calls, pads among them.
        attention_mask: `[B, S]`, 0 at pads; of this call alone, or of the whole sequence so far:
            then columns behind this call are left out, as transformers does.
        position_ids: `[B, T]`; a document begins where they do not go up by one.
        segment_ids, seq_idx: `[B, T]` integers, equal in a document.
        cu_seq_lens: `[n + 1]`, where documents begin and end in the call's only row.

    Returns:
        `[B, T]` int64, or None where every row simply goes on, without pads.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
    """
    batch, length = shape
    ids = segment_ids if segment_ids is not None else seq_idx
    if ids is None and cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected one row of documents, [1, T], got {batch} rows; flatten "
                "them, or pass position_ids"
            )
        ids = segment_ids_from_cu_seqlens(cu_seq_lens, length)
        if held is not None:  # never the document that the state is in
            ids = torch.where(ids < 0, PAD_SEGMENT, ids + held.clamp(min=-1)[:, None] + 1)
    if ids is None and position_ids is not None:
        ids = _from_positions(position_ids, held, shape)
    mask = None if attention_mask is None else _mask_of_call(attention_mask, shape, seen)
    if ids is not None:
        expect_shape("segment_ids", ids, shape, "[B, T] of the call")
        return ids if mask is None else ids.masked_fill(mask == 0, PAD_SEGMENT)
    return None if mask is None else segment_ids_from_attention_mask(mask, held)


def _from_positions(
    position_ids: Tensor, held: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    if position_ids.dim() == 2 and len(position_ids) == 1:  # as transformers, one for all rows
        position_ids = position_ids.expand(shape[0], -1)
    expect_shape("position_ids", position_ids, shape, "[B, T] of the call")
    ids = segment_ids_from_position_ids(position_ids, held)
    if torch.compiler.is_compiling():
        return ids
    # Ids go up with each document: rows that end where they began go on with one.
    first = torch.zeros_like(ids[:, -1]) if held is None else held.clamp(min=0)
    return None if torch.equal(ids[:, -1], first) else ids


def _mask_of_call(attention_mask: Any, shape: tuple[int, int], seen: int) -> Tensor | None:
    """The mask's columns of this call, `[B, T]`; None if it hides nothing."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: expected [B, length] with 0 at pads and 1 elsewhere, got {got}; what "
            "a token sees is the layers' affair: tell documents apart with segment_ids, and leave "
            "cache_implementation out"
        )
    mask, length = attention_mask, shape[1]
    if mask.shape[1] != length:
        if mask.shape[1] < seen + length:
            whole = f" or the {seen + length} of the sequence so far" if seen else ""
            raise ValueError(
                f"attention_mask: expected at least the {length} columns of input_ids{whole}, got "
                f"{mask.shape[1]}; append a 1 for each new token"
            )
        mask = mask[:, seen : seen + length]
    expect_shape("attention_mask", mask, shape, "[B, T] of the call")
    # A sync for a faster path; transformers pays the same for its own masks.
    return None if not torch.compiler.is_compiling() and bool((mask != 0).all()) else mask


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
