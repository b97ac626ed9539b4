"""Convert between segment ids and the other ways of marking documents in packed or padded batches.

segment_ids     [B, T]   same id within a document, negative at padding; what the layers take
cu_seqlens      [n + 1]  cumulative document lengths in a single packed row; used by flash-attn
position_ids    [B, T]   a token's position in its document, so that it restarts with each document
attention_mask  [B, T]   0 at padding, 1 elsewhere
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.checks import expect_count, expect_shape
from longctx_layers.ops.segments import PAD_SEGMENT


class CuSeqlens(NamedTuple):
    """How to pack a batch into one row without padding, as variable-length kernels expect it.

    Attributes:
        cu_seqlens: `[n + 1]` int32, cumulative lengths of the n documents, starting with 0.
        max_seqlen: length of the longest document; 0 if there are no documents.
        indices: `[N]` int64, positions of the N real tokens in the flattened batch, `[B * T]`. For
            x `[B, T, D]`, `x.flatten(0, 1)[indices]` is the packed row, `[N, D]`.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor


def segment_ids_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Run a layer on a packed row that is described by cumulative lengths, as flash-attn does.

    >>> from longctx_layers.packing import segment_ids_from_cu_seqlens
    >>> segment_ids_from_cu_seqlens(torch.tensor([0, 3, 5]), length=6)
    tensor([[ 0,  0,  0,  1,  1, -1]])

    Args:
        cu_seqlens: `[n + 1]` integers, n >= 0: 0, then the end of each document, in non-decreasing
            order. An empty document uses up an id but has no token.
        length: length of the row; tokens after the last document are padding. By default the row
            ends with its last document. Passing it avoids a synchronisation on a GPU, but then the
            values of cu_seqlens are not checked.

    Returns:
        Segment ids `[1, length]` int64: 0, 1, 2, ..., and -1 at padding.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype or order.
    """
    expect_shape("cu_seqlens", cu_seqlens, (None,), "[n + 1]")
    _expect_integers("cu_seqlens", cu_seqlens)
    if len(cu_seqlens) == 0:
        raise ValueError(
            "cu_seqlens: expected at least one element, 0, got an empty tensor; pass [0] for a row "
            "without documents"
        )
    if length is not None:
        expect_count("length", length)
    values_are_free = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if length is None or values_are_free:
        length = _checked_length(cu_seqlens.tolist(), length)
    index = torch.arange(length, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long()
    ids = torch.searchsorted(ends, index, right=True)
    return torch.where(ids < len(ends), ids, PAD_SEGMENT)[None]


def cu_seqlens_from_segment_ids(segment_ids: Tensor) -> CuSeqlens:
    """Pack a batch into one row without padding, e.g. for a variable-length attention kernel.

    A document is a run of equal ids in one row; padding inside the run does not split it. This
    synchronises a GPU, because the number of documents is a shape.

    >>> from longctx_layers.packing import cu_seqlens_from_segment_ids
    >>> packed = cu_seqlens_from_segment_ids(torch.tensor([[-1, 0, 0], [0, 0, 1]]))
    >>> packed.cu_seqlens.tolist(), packed.max_seqlen, packed.indices.tolist()
    ([0, 2, 4, 5], 2, [1, 2, 3, 4, 5])

    Args:
        segment_ids: `[B, T]` integers, negative at padding.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype.
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
    """Find the documents of packed rows from positions that restart with each document.

    A new document starts wherever positions do not increase by one. Only real tokens are compared:
    padding inside a document may or may not be counted as positions, as both conventions exist.

    >>> from longctx_layers.packing import segment_ids_from_position_ids
    >>> segment_ids_from_position_ids(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])

    Args:
        position_ids: `[B, T]` integers.
        held: `[B]` integers, the segment that each row's state is in, negative if none. The segment
            continues unless the first real token of the row has position 0. None if there is no
            state.
        attention_mask: `[B, T]`, 0 at padding, where positions are ignored. None for no padding.

    Returns:
        Segment ids `[B, T]` int64, which count up from the held ids, or from 0; -1 at padding.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype.
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
    """Compute each token's position in its document, for a model that needs positions.

    >>> from longctx_layers.packing import position_ids_from_segment_ids
    >>> position_ids_from_segment_ids(torch.tensor([[-1, 0, 0, 0, 1]]))
    tensor([[0, 0, 1, 2, 0]])

    Args:
        segment_ids: `[B, T]` integers, negative at padding.

    Returns:
        `[B, T]` int64, starting with 0 in each document; padding is not counted and gets 0.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype.
    """
    _check_rows("segment_ids", segment_ids)
    real = segment_ids >= 0
    count = real.cumsum(1) - 1
    before = _real_before(real)
    earlier = segment_ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, PAD_SEGMENT)
    begins = real & (earlier != segment_ids)
    start = torch.where(begins, count, 0).cummax(1).values
    return torch.where(real, count - start, 0)


def segment_ids_from_attention_mask(attention_mask: Tensor, held: Tensor | None = None) -> Tensor:
    """Run a layer on a padded batch with one document per row; padding may be anywhere.

    >>> from longctx_layers.packing import segment_ids_from_attention_mask
    >>> segment_ids_from_attention_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    tensor([[-1, -1,  0,  0],
            [ 0,  0,  0,  0]])

    Args:
        attention_mask: `[B, T]`, integers or bool.
        held: `[B]` integers, the segment that each row's state is in and that continues here,
            negative if none. None if there is no state.

    Returns:
        Segment ids `[B, T]` int64: the held id, or 0, at real tokens; -1 at padding.

    Raises:
        ValueError: for a mask of another shape, such as a 4-D mask of queries and keys, or for one
            that numbers documents.
    """
    expect_shape("attention_mask", attention_mask, (None, None), "[B, T]")
    if not torch.compiler.is_compiling():
        expect_zeros_and_ones(attention_mask, bool(is_binary(attention_mask)))
    ids = attention_mask.new_zeros(len(attention_mask), 1, dtype=torch.int64)
    if held is not None:
        ids = held.clamp(min=0)[:, None].long()
    return torch.where(attention_mask != 0, ids, PAD_SEGMENT)


def is_binary(attention_mask: Tensor) -> Tensor:
    """Whether all values of a mask are 0 or 1, as a scalar tensor."""
    return ((attention_mask == 0) | (attention_mask == 1)).all()


def expect_zeros_and_ones(attention_mask: Tensor, binary: bool) -> None:
    """Raise ValueError for a mask that is not binary."""
    if not binary:
        raise ValueError(
            "attention_mask: expected 0 at padding and 1 elsewhere, got values from "
            f"{attention_mask.min().item()} to {attention_mask.max().item()}; if they number "
            "documents, pass segment_ids instead (negative at padding)"
        )


def _real_before(real: Tensor) -> Tensor:
    """The last column before each one that holds a real token, `[B, T]`; -1 if there is none."""
    column = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, column, -1).cummax(1).values
    return F.pad(last, (1, 0), value=-1)[:, : len(column)]


def _checked_length(bounds: list[int], length: int | None) -> int:
    if bounds[0] != 0 or bounds != sorted(bounds) or (length is not None and bounds[-1] > length):
        limit = "" if length is None else f", and at most the row's length, {length}"
        raise ValueError(
            f"cu_seqlens: expected non-decreasing integers starting with 0{limit}, got "
            f"{bounds[:20]}; pass the cumulative sum of the document lengths, preceded by 0"
        )
    return bounds[-1] if length is None else length


def _check_rows(name: str, x: Tensor) -> None:
    expect_shape(name, x, (None, None), "[B, T]")
    _expect_integers(name, x)


def _expect_integers(name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}; convert it with .long()")
