"""Sparse attention whose range runs on torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import availability
from longctx_layers.ops.attention.far import FarKeys, far_attention, merge
from longctx_layers.ops.attention.pattern import Pattern

if TYPE_CHECKING:  # slow to import: it brings torch's compiler along
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # FlexAttention's own default
_DIMS = (16, 256)  # head dimensions that its kernels take


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    **_: Any,
) -> str | None:
    """Why FlexAttention can't run a call of `sparse_attention`, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] > _DIMS[1]:
        return f"takes head_dim up to {_DIMS[1]}, got {q.shape[-1]}"
    if dropout_p > 0:
        return f"drops no attention weights, got dropout_p = {dropout_p}"
    if q.device.type == "cuda":
        installed = availability.INSTALLED
        return None if installed else "needs Triton: pip install 'longctx-layers[triton]'"
    if far is not None:
        return "has no log-sum-exp on a CPU, with which to merge far keys"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "has no gradients on a CPU: use torch.no_grad()"
    return None


def reserve(q: Tensor, *_: Any, **__: Any) -> str | None:
    """Why FlexAttention runs a call only when asked for by name, or None."""
    if q.device.type == "cpu":
        return "compiles for many seconds on a CPU: runs there only when asked for by name"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """`longctx_layers.ops.sparse_attention` on FlexAttention."""
    batch, heads, length, dim = q.shape
    prefix = k.shape[2] - length
    first = pattern.first_key(length, prefix, q.device)
    if dim < _DIMS[0]:
        q, k, v = (F.pad(x, (0, _DIMS[0] - dim)) for x in (q, k, v))
    result = compiled(q.device.type)(
        q,
        k,
        v,
        block_mask=range_mask(first.expand(batch, -1), prefix),
        scale=scale,
        enable_gqa=heads != k.shape[1],
        **({} if far is None else _ask_for_lse()),
    )
    if far is None:
        y: Tensor = result[..., :dim]
        return y
    y, lse = result
    lse = getattr(lse, "lse", lse)  # from torch 2.9 on, one of several auxiliary outputs
    return merge(y[..., :dim], lse, *far_attention(far, dropout_p, scale))[0]


@lru_cache(None)
def compiled(device_type: str) -> Callable[..., Any]:
    """FlexAttention as one kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    # Without a full graph, torch.compile could silently compute all T x S scores. For dynamic sizes
    # inductor's CPU backend may write invalid C++: on a CPU each size has a kernel of its own.
    dynamic = False if device_type == "cpu" else None
    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


def _ask_for_lse() -> dict[str, Any]:
    from torch.nn.attention import flex_attention as flex

    if hasattr(flex, "AuxRequest"):
        return {"return_aux": flex.AuxRequest(lse=True)}
    return {"return_lse": True}


def range_mask(first: Tensor, prefix: int) -> BlockMask:
    """The mask by which query i sees the keys from `first[:, i]` to its own.

    Args:
        first: `[B, T]` from `Pattern.first_key`, never falling along a row.
        prefix: number of cached keys before the queries' own.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = first.shape[1], first.device
    first = (first + prefix).to(torch.int32)
    last = torch.arange(prefix, prefix + length, device=device, dtype=torch.int32)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= first[b, i]) & (j <= last[i])

    rows, columns = (-(-n // _BLOCK) for n in (length, prefix + length))
    top = torch.arange(rows, device=device) * _BLOCK
    bottom = (top + _BLOCK - 1).clamp(max=length - 1)
    column = torch.arange(columns, device=device) * _BLOCK
    # The keys that some query of a block sees are one range, as are those that every query sees.
    # The last block of queries is never full if it is shorter than the others.
    some = (column + _BLOCK > first[:, top, None]) & (column <= last[bottom, None])
    full = (column >= first[:, bottom, None]) & (column + _BLOCK - 1 <= last[top, None])
    full &= (top + _BLOCK <= length)[:, None]

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:  # the count in each row, and which
        order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *ordered(some & ~full),
        *ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, prefix + length),
    )
