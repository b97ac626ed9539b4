"""What a call to a model of transformers says about its pads and documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.checks import expect_shape
from longctx_layers.ops.segments import PAD_SEGMENT
from longctx_layers.packing import (
    expect_zeros_and_ones,
    is_binary,
    segment_ids_from_cu_seqlens,
    segment_ids_from_position_ids,
)

# The arguments of a call, by transformers' names, that do nothing but tell documents apart.
DOCUMENTS = ("segment_ids", "seq_idx", "cu_seq_lens_q")


def record_pads(pads: Tensor | None, seen: int, segment_ids: Tensor | None) -> Tensor | None:
    """Which columns a state has read as pads, after one more call.

    Args:
        pads: `[B, n]` bool, n <= seen, True at pads; later columns were tokens. None without pads.
        seen: columns read before the call.
        segment_ids: `[B, T]` of the call; None for tokens only.
    """
    if segment_ids is None:
        return pads
    now = segment_ids < 0
    before = now.new_zeros(len(now), seen) if pads is None else F.pad(pads, (0, _short(pads, seen)))
    return torch.cat([before, now], dim=1)


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
    pads: Tensor | None = None,
) -> Tensor | None:
    """Segment ids of a call to a model of transformers, from whatever of it says something.

    Documents are told apart by the first of these that is given: segment_ids, seq_idx,
    cu_seq_lens, position_ids. Pads are where attention_mask is 0, or segment_ids negative.

    Args:
        shape: batch and length of the call.
        held: `[B]`, the ids of the segments that the rows' states are in; None to begin.
        seen: columns of earlier calls, pads among them.
        attention_mask: `[B, S]`, 0 at pads and 1 elsewhere; of this call alone, or of the whole
            sequence so far, whose earlier columns must be as the state has read them. Columns
            after this call are left out, as transformers does.
        position_ids: `[B, T]`; a document begins where they do not go up by one.
        segment_ids, seq_idx: `[B, T]` integers, equal in a document.
        cu_seq_lens: `[n + 1]`, where documents begin and end in the call's only row.
        pads: the columns that the state has read as pads, from `record_pads`.

    Returns:
        `[B, T]` int64, or None where every row continues its segment, without pads.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit, and for a mask that numbers
            documents or contradicts what the state has read. Under torch.compile the values of a
            mask are not looked at.
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
    mask = None if attention_mask is None else _mask_of_call(attention_mask, shape, seen, pads)
    if ids is None and position_ids is not None:
        ids = _from_positions(position_ids, held, shape, mask)
    if ids is not None:
        expect_shape("segment_ids", ids, shape, "[B, T] of the call")
        return ids if mask is None else ids.masked_fill(mask == 0, PAD_SEGMENT)
    if mask is None:
        return None
    own = torch.zeros_like(mask[:, :1], dtype=torch.int64)
    if held is not None:
        own = held.clamp(min=0)[:, None].long()
    return torch.where(mask != 0, own, PAD_SEGMENT)


def _from_positions(
    position_ids: Tensor, held: Tensor | None, shape: tuple[int, int], mask: Tensor | None
) -> Tensor | None:
    if position_ids.dim() == 2 and len(position_ids) == 1:  # as transformers, one for all rows
        position_ids = position_ids.expand(shape[0], -1)
    expect_shape("position_ids", position_ids, shape, "[B, T] of the call")
    ids = segment_ids_from_position_ids(position_ids, held, mask)
    if torch.compiler.is_compiling() or not ids.numel():
        return ids
    # Ids go up with each document: rows that never exceed their first id hold one only.
    first = torch.zeros_like(ids[:, 0]) if held is None else held.clamp(min=0)
    return None if bool((ids.amax(1) <= first).all()) else ids


def _mask_of_call(
    attention_mask: Any, shape: tuple[int, int], seen: int, pads: Tensor | None
) -> Tensor | None:
    """The mask's columns of this call, `[B, T]`; None if it hides nothing."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: expected [B, length] with 0 at pads and 1 elsewhere, got {got}; what "
            "a token sees is the layers' affair: tell documents apart with segment_ids, and leave "
            "cache_implementation out"
        )
    mask, length, past = attention_mask, shape[1], None
    if mask.shape[1] != length:
        if mask.shape[1] < seen + length:
            whole = f" or the {seen + length} of the sequence so far" if seen else ""
            raise ValueError(
                f"attention_mask: expected at least the {length} columns of input_ids{whole}, got "
                f"{mask.shape[1]}; append a 1 for each new token"
            )
        mask, past = mask[:, seen : seen + length], mask[:, :seen]
    expect_shape("attention_mask", mask, shape, "[B, T] of the call")
    if torch.compiler.is_compiling():
        return mask
    wrong = torch.zeros_like(mask, dtype=torch.bool)
    if past is not None and (pads is None or len(pads) == len(past)):
        known = pads if pads is not None else wrong[:, :0]
        wrong = (past == 0) != F.pad(known, (0, _short(known, seen))).to(past.device)
    # One sync for all three, and then a faster path; transformers pays the same for its own masks.
    hides, binary, agrees = torch.stack(
        [(mask == 0).any(), is_binary(attention_mask), ~wrong.any()]
    ).tolist()
    expect_zeros_and_ones(attention_mask, binary)
    if not agrees:
        row, column = wrong.nonzero()[0].tolist()
        given = int(attention_mask[row, column])
        read = "a pad" if given else "a token"
        raise ValueError(
            f"attention_mask: expected the {seen} columns before this call as the cache has read "
            f"them, got {given} for column {column} of row {row}, which was read as {read}; a "
            "state cannot take that back: mark pads in the call that reads them, and keep their "
            "0s in later masks, or begin with a new cache"
        )
    return mask if hides else None


def _short(pads: Tensor, seen: int) -> int:
    return max(seen - pads.shape[1], 0)
