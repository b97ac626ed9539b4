"""Window and chunk attention on a CPU: one head at a time, so that its scores stay in the cache.

A head's queries are cut into blocks, and each block sees a span of whole blocks that ends with its
own. The spans overlap as views of one padded tensor, so that no key is copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx_layers.ops.attention.far import FarKeys, far_attention, merge
from longctx_layers.ops.attention.pattern import Pattern
from longctx_layers.ops.second_order import own_backward

LONGEST_REACH = 4096  # keys: with longer windows, a head's scores do not fit the cache
FEWEST_SCORES = 2**14  # of a head: with fewer, calling operations takes longer than running them

_softmax = torch.ops.aten._softmax.out
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def refuse(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, dropout_p: float, **_: Any
) -> str | None:
    """Why this path can't run a call, or None."""
    reach = pattern.reach()
    if reach is None:
        return "needs a window or a chunk"
    if reach > LONGEST_REACH:
        return f"takes windows and chunks of up to {LONGEST_REACH} keys"
    if (count := q.shape[2] * min(reach, k.shape[2])) < FEWEST_SCORES:
        return f"needs at least {FEWEST_SCORES:,} queries times keys of a head, got {count:,}"
    if dropout_p > 0:
        return f"drops no attention weights, got dropout_p = {dropout_p}"
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
    """`longctx_layers.ops.sparse_attention` on a CPU."""
    prefix = k.shape[2] - q.shape[2]
    first = pattern.first_key(q.shape[2], prefix, q.device)
    limit = pattern.reach()
    assert limit is not None
    reach = min(limit, k.shape[2])
    chunk_size = pattern.chunk_size
    aligned = pattern.segments is None and pattern.chunk_shift == 0 and prefix == 0
    if aligned and chunk_size is not None and chunk_size <= 256:
        block, before = chunk_size, 0
    else:
        # Half the reach: shorter blocks make small products, longer ones see more that is masked.
        block = min(128, max(16, 1 << (reach - 1).bit_length() >> 1))
        before = -(-(reach - 1) // block)
    unseen = max(k.shape[2] - q.shape[2] - before * block, 0)  # cached keys out of reach
    k, v = k[:, :, unseen:], v[:, :, unseen:]
    y, lse = _Spans.apply(q, k, v, first, block, before, scale, far is not None)
    if far is None:
        return y
    merged: Tensor = merge(y, lse, *far_attention(far, dropout_p, scale))[0]
    return merged


class _Spans(torch.autograd.Function):
    """Attention over spans, and the log-sum-exp of the scores (empty without `with_lse`).

    q `[B, H, T, P]`, k and v `[B, G, S, P]` with the queries' keys last; first `[B or 1, T]` from
    `Pattern.first_key`; a block sees its own keys and those of `before` blocks before it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        block: int,
        before: int,
        scale: float,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        layout = _Layout(q, k, v, first, block, before, scale)
        precise = layout.q.dtype
        shape = layout.q.shape
        # In memory [B, T, H, P], the layout in which the layers use it.
        y = q.new_empty(shape[0], shape[2], shape[1], shape[3], dtype=precise).transpose(1, 2)
        lse = q.new_empty(shape[:3] if with_lse else 0, dtype=precise)
        weights = layout.buffer()
        for b, h, queries, keys, values in layout.heads():
            scores = layout.scores(b, queries, keys)
            _softmax(scores, -1, False, out=weights)
            y[b, h] = torch.bmm(weights, values.mT).flatten(0, 1)
            if with_lse:
                lse[b, h] = (scores.amax(-1) - weights.amax(-1).log()).flatten()
        ctx.save_for_backward(q, k, v, first)
        ctx.options = block, before, scale, with_lse
        length = q.shape[2]
        return y[:, :, :length].to(q.dtype), lse[:, :, :length] if with_lse else lse

    @staticmethod
    @own_backward
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first = ctx.saved_tensors
        block, before, scale, with_lse = ctx.options
        layout = _Layout(q, k, v, first, block, before, scale)
        length = q.shape[2]
        precise = layout.q.dtype
        dy = padded(dy, 2, 0, layout.back, precise).unflatten(2, (-1, block))
        if with_lse:
            dlse = padded(dlse, 2, 0, layout.back, precise).unflatten(2, (-1, block))
        dq = layout.q.new_empty(layout.q.shape)
        dk = layout.k.new_zeros(layout.k.shape)
        dv = layout.v.new_zeros(layout.v.shape)
        weights = layout.buffer()
        ds = layout.buffer()
        for b, h, queries, keys, values in layout.heads():
            scores = layout.scores(b, queries, keys)
            _softmax(scores, -1, False, out=weights)
            torch.bmm(dy[b, h], values, out=scores)
            _softmax_backward(scores, weights, -1, precise, grad_input=ds)
            if with_lse:
                ds.addcmul_(weights, dlse[b, h, ..., None])
            ds.mul_(scale)
            torch.bmm(ds, keys.mT, out=dq[b, h].unflatten(0, (-1, block)))
            layout.fold(ds, queries, dk[b, h // layout.share])
            layout.fold(weights, dy[b, h], dv[b, h // layout.share])
        own = slice(layout.front, layout.front + k.shape[2])
        return (
            dq[:, :, :length].to(q.dtype),
            dk[:, :, own].to(k.dtype),
            dv[:, :, own].to(v.dtype),
            *[None] * 5,
        )


class _Layout:
    """Queries, keys and values in whole blocks, and the mask of a block's span."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, block: int, before: int, scale: float
    ) -> None:
        precise = torch.promote_types(q.dtype, torch.float32)
        length = q.shape[2]
        blocks = -(-length // block)
        self.block = block
        self.span = (before + 1) * block
        self.back = blocks * block - length
        self.front = before * block - (k.shape[2] - length)
        self.scale = scale
        self.q = padded(q, 2, 0, self.back, precise)
        self.k = padded(k, 2, self.front, self.back, precise)
        self.v = padded(v, 2, self.front, self.back, precise)
        self.share = q.shape[1] // k.shape[1]
        # Padding queries in the last block see some keys too, so that no row is empty.
        i = torch.arange(blocks * block, dtype=torch.int32).unflatten(0, (blocks, block))
        j = i[:, :1] + torch.arange(block - self.span, block, dtype=torch.int32)
        padding = first.new_zeros(len(first), self.back)
        first = torch.cat([first, padding], 1).to(torch.int32).unflatten(1, (blocks, block))
        hidden = (j[:, None] < first[..., None]) | (j[:, None] > i[..., None])
        self.bias = q.new_zeros(hidden.shape, dtype=precise).masked_fill_(hidden, -math.inf)
        # Shared by all heads: new memory would not be in the cache.
        self._scores = self.buffer()
        self._spans = q.new_empty(blocks, self.span, q.shape[3], dtype=precise)

    def buffer(self) -> Tensor:
        """Memory for the scores of one head, `[n, block, span]`."""
        return torch.empty_like(self.bias[0])

    def heads(self) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """`(b, h, queries [n, block, P], keys [n, P, span], values [n, P, span])` of every head."""
        batch, heads = self.q.shape[:2]
        for b, h in itertools.product(range(batch), range(heads)):
            g = h // self.share
            queries = self.q[b, h].unflatten(0, (-1, self.block))
            keys = self.k[b, g].unfold(0, self.span, self.block)
            values = self.v[b, g].unfold(0, self.span, self.block)
            yield b, h, queries, keys, values

    def scores(self, b: int, queries: Tensor, keys: Tensor) -> Tensor:
        """`[n, block, span]`, overwritten by the next head's."""
        bias = self.bias[b if len(self.bias) > 1 else 0]
        return torch.baddbmm(bias, queries, keys, alpha=self.scale, out=self._scores)

    def fold(self, weights: Tensor, rows: Tensor, total: Tensor) -> None:
        """Add `weights^T rows`, the gradient of each block's span, to that of all keys."""
        torch.bmm(weights.mT, rows, out=self._spans)
        count = len(rows)
        blocks = total.unflatten(0, (-1, self.block))
        for n, part in enumerate(self._spans.unflatten(1, (-1, self.block)).unbind(1)):
            blocks[n : n + count] += part


def padded(x: Tensor, dim: int, front: int, back: int, dtype: torch.dtype) -> Tensor:
    """x in `dtype` with zeros before and after it along one dimension: x itself, or a copy."""
    if not front and not back and x.dtype == dtype:
        return x
    shape = list(x.shape)
    shape[dim] += front + back
    y = x.new_empty(shape, dtype=dtype)
    y.narrow(dim, 0, front).zero_()
    y.narrow(dim, front, x.shape[dim]).copy_(x)
    y.narrow(dim, front + x.shape[dim], back).zero_()
    return y
