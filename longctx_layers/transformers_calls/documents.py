"""Turn the masks, positions and document ids of a transformers call into segment ids."""

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

# Arguments of a transformers call whose only purpose is to separate documents.
DOCUMENTS = ("segment_ids", "seq_idx", "cu_seq_lens_q")


def record_pads(pads: Tensor | None, seen: int, segment_ids: Tensor | None) -> Tensor | None:
    """Extend the record of which columns a state has read as padding by one call.

    Args:
        pads: `[B, n]` bool, n <= seen, True at padding; later columns were tokens. None if there
            was no padding.
        seen: number of columns read before the call.
        segment_ids: `[B, T]`, the call's; None for a call without padding.

    Returns:
        `[B, seen + T]` bool, or `pads` unchanged for a call without segment ids.
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
    """Compute the segment ids of a transformers call from its arguments.

    The first of these that is given separates the documents: segment_ids, seq_idx, cu_seq_lens,
    position_ids. Padding is where attention_mask is 0 or segment_ids are negative.

    Args:
        shape: (B, T) of the call.
        held: `[B]`, the segment that each row's state is in; None without a state.
        seen: number of columns in earlier calls, including padding.
        attention_mask: `[B, S]`, 0 at padding and 1 elsewhere, for this call (S = T) or for the
            whole sequence so far (S >= seen + T). In the latter case its first `seen` columns must
            agree with what the state has read, and columns after the call are ignored, as in
            transformers.
        position_ids: `[B, T]`; a document starts wherever they do not increase by one.
        segment_ids, seq_idx: `[B, T]` integers, the same id within a document.
        cu_seq_lens: `[n + 1]`, cumulative document lengths; only for B = 1.
        pads: which columns the state has read as padding, from `record_pads`.

    Returns:
        `[B, T]` int64, or None if every row continues its segment without padding.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype, and for a mask that numbers documents or
            contradicts what the state has read. Mask values are not checked under torch.compile.
    """
    batch, length = shape
    ids = segment_ids if segment_ids is not None else seq_idx
    if ids is None and cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected a single packed row, [1, T], got {batch} rows; flatten "
                "them into one, or pass position_ids"
            )
        ids = segment_ids_from_cu_seqlens(cu_seq_lens, length)
        if held is not None:  # these documents are new: none continues the state's segment
            ids = torch.where(ids < 0, PAD_SEGMENT, ids + held.clamp(min=-1)[:, None] + 1)
    mask = None if attention_mask is None else _mask_of_call(attention_mask, shape, seen, pads)
    if ids is None and position_ids is not None:
        ids = _from_positions(position_ids, held, shape, mask)
    if ids is not None:
        expect_shape("segment_ids", ids, shape, "[B, T] of the call")
        return ids if mask is None else ids.masked_fill(mask == 0, PAD_SEGMENT)
    if mask is None:
        return None
    current = torch.zeros_like(mask[:, :1], dtype=torch.int64)
    if held is not None:
        current = held.clamp(min=0)[:, None].long()
    return torch.where(mask != 0, current, PAD_SEGMENT)


def _from_positions(
    position_ids: Tensor, held: Tensor | None, shape: tuple[int, int], mask: Tensor | None
) -> Tensor | None:
    """Segment ids `[B, T]` from positions; None if no row has more than one document."""
    if position_ids.dim() == 2 and len(position_ids) == 1:  # transformers shares them among rows
        position_ids = position_ids.expand(shape[0], -1)
    expect_shape("position_ids", position_ids, shape, "[B, T] of the call")
    ids = segment_ids_from_position_ids(position_ids, held, mask)
    if torch.compiler.is_compiling() or not ids.numel():
        return ids
    # Ids increase with each document, so a row with one document never exceeds its first id.
    first = torch.zeros_like(ids[:, 0]) if held is None else held.clamp(min=0)
    return None if bool((ids.amax(1) <= first).all()) else ids


def _mask_of_call(
    attention_mask: Any, shape: tuple[int, int], seen: int, pads: Tensor | None
) -> Tensor | None:
    """Check a mask and return its columns for this call, `[B, T]`; None if there is no padding."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: expected [B, length] with 0 at padding and 1 elsewhere, got {got}; "
            "these layers define their own attention pattern: pass segment_ids to separate "
            "documents, and do not set cache_implementation"
        )
    mask = attention_mask
    past = None
    length = shape[1]
    if mask.shape[1] != length:
        if mask.shape[1] < seen + length:
            whole = f", or the {seen + length} of the sequence so far" if seen else ""
            raise ValueError(
                f"attention_mask: expected at least the {length} columns of input_ids{whole}, got "
                f"{mask.shape[1]}; append a 1 for each new token"
            )
        past = mask[:, :seen]
        mask = mask[:, seen : seen + length]
    expect_shape("attention_mask", mask, shape, "[B, T] of the call")
    if torch.compiler.is_compiling():
        return mask
    wrong = torch.zeros_like(mask, dtype=torch.bool)
    if past is not None and (pads is None or len(pads) == len(past)):
        known = pads if pads is not None else wrong[:, :0]
        wrong = (past == 0) != F.pad(known, (0, _short(known, seen))).to(past.device)
    # One synchronisation answers all three questions; transformers needs one for its masks too.
    hides, binary, agrees = torch.stack(
        [(mask == 0).any(), is_binary(attention_mask), ~wrong.any()]
    ).tolist()
    expect_zeros_and_ones(attention_mask, binary)
    if not agrees:
        row, column = wrong.nonzero()[0].tolist()
        value = int(attention_mask[row, column])
        read_as = "padding" if value else "a token"
        raise ValueError(
            f"attention_mask: expected the same {seen} past columns as in earlier calls, got "
            f"{value} for column {column} of row {row}, which was read as {read_as}; the state "
            "cannot undo that: mark padding in the call that reads it and keep the 0s in later "
            "masks, or start with a new cache"
        )
    return mask if hides else None


def _short(pads: Tensor, seen: int) -> int:
    """How many of the `seen` columns, all of them tokens, the record does not list."""
    return max(seen - pads.shape[1], 0)
