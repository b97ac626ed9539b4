"""What transformers says about a call's documents and pads, as segment ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.generation import PAD_SEGMENT
from longctx_layers.ops.checks import expect_shape
from longctx_layers.varlen import (
    segment_ids_from_attention_mask,
    segment_ids_from_cu_seqlens,
    segment_ids_from_position_ids,
)


def call_segments(
    shape: tuple[int, int],
    held: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor | None:
    """Segment ids of a call, or None where every row simply goes on, without pads.

    Documents are told apart by the first of these that is given: segment_ids, seq_idx,
    cu_seq_lens, position_ids. Pads are where attention_mask is 0, or segment_ids negative.

    Args:
        shape: batch and length of the call.
        held: `[B]`, the ids of the segments that the rows' states are in; None to begin.
        attention_mask: `[B, S]`, 0 at pads; of the whole sequence so far or of this call alone.
        position_ids: `[B, T]`; a document begins where they do not go up by one.
        segment_ids, seq_idx: `[B, T]` integers, equal in a document.
        cu_seq_lens: `[n + 1]`, where documents begin and end in the call's only row.

    Returns:
        `[B, T]` int64, or None.

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
    mask = None if attention_mask is None else _mask_of_call(attention_mask, shape)
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


def _mask_of_call(attention_mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """The mask's columns of this call, `[B, T]`; None if it hides nothing."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: expected [B, length] with 0 at pads and 1 elsewhere, got {got}; what "
            "a token sees is the layers' affair: tell documents apart with segment_ids"
        )
    if attention_mask.shape[1] < shape[1]:
        raise ValueError(
            f"attention_mask: expected at least the {shape[1]} columns of input_ids, got "
            f"{attention_mask.shape[1]}; append a 1 for each new token"
        )
    mask = attention_mask[:, attention_mask.shape[1] - shape[1] :]
    expect_shape("attention_mask", mask, shape, "[B, T] of the call")
    # A sync for a faster path; transformers pays the same for its own masks.
    return None if not torch.compiler.is_compiling() and bool((mask != 0).all()) else mask
