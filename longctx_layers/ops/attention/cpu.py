"""Window and chunk attention on a CPU: one head at a time, so that its scores stay in the cache.

A head's queries are cut into blocks, and each block sees a span of whole blocks that ends with its
own. The spans overlap as views of one padded tensor: no key is copied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx_layers.ops import cpu_support
from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.attention.merge import far_attention, merge
from longctx_layers.ops.cpu_support import padded
from longctx_layers.ops.segments import Segments, cover, range_start

LONGEST_REACH = 4096  # of keys: beyond, a head's scores would leave the cache
FEWEST_SCORES = 2**14  # of a head: with fewer, calling operations takes longer than running them

_softmax = torch.ops.aten._softmax.out
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None,
    chunk_size: int | None,
    dropout_p: float,
    **_: Any,
) -> str | None:
    """Why this path can't run a call, or None."""
    if (reason := cpu_support.refuse(q)) is not None:
        return reason
    if window_size is None and chunk_size is None:
        return "needs a window or a chunk"
    if min(n for n in (window_size, chunk_size) if n is not None) > LONGEST_REACH:
        return f"takes windows and chunks of up to {LONGEST_REACH} keys"
    if (count := q.shape[2] * _reach(window_size, chunk_size, k)) < FEWEST_SCORES:
        return f"needs at least {FEWEST_SCORES:,} queries times keys of a head, got {count:,}"
    if dropout_p > 0:
        return f"drops no attention weights, got dropout_p = {dropout_p}"
    return None


def _reach(window_size: int | None, chunk_size: int | None, k: Tensor) -> int:
    """The most keys that a query sees."""
    return min(n for n in (window_size, chunk_size, k.shape[2]) if n is not None)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None,
    chunk_size: int | None,
    chunk_shift: int,
    segments: Segments | None,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """`longctx_layers.ops.sparse_attention` on a CPU."""
    first = range_start(
        q.shape[2],
        segments,
        prefix=k.shape[2] - q.shape[2],
        window_size=window_size,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        device=q.device,
    )
    reach = _reach(window_size, chunk_size, k)
    aligned = segments is None and chunk_shift == 0 and k.shape[2] == q.shape[2]
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
    """Attention over spans, and the log-sum-exp of the scores if it is asked for (else empty).

    q `[B, H, T, P]`, k and v `[B, G, S, P]` with the queries' keys last; first `[B or 1, T]` as
    `range_start` gives it; a block sees its own keys and those of `before` blocks before it.
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
        precise, shape = layout.q.dtype, layout.q.shape
        # In memory [B, T, H, P], as the layers go on with it.
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
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first = ctx.saved_tensors
        block, before, scale, with_lse = ctx.options
        layout = _Layout(q, k, v, first, block, before, scale)
        length, precise = q.shape[2], layout.q.dtype
        dy = padded(dy, 2, 0, layout.back, precise).unflatten(2, (-1, block))
        if with_lse:
            dlse = padded(dlse, 2, 0, layout.back, precise).unflatten(2, (-1, block))
        dq = layout.q.new_empty(layout.q.shape)
        dk, dv = (x.new_zeros(x.shape) for x in (layout.k, layout.v))
        weights, ds = layout.buffer(), layout.buffer()
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
        length, self.block, self.span = q.shape[2], block, (before + 1) * block
        blocks = cover(length, block)
        self.back = blocks * block - length
        self.front = before * block - (k.shape[2] - length)
        self.q, self.scale = padded(q, 2, 0, self.back, precise), scale
        self.k, self.v = (padded(x, 2, self.front, self.back, precise) for x in (k, v))
        self.share = q.shape[1] // k.shape[1]
        # Queries that pad the last block see some keys too: no row is ever empty.
        i = torch.arange(blocks * block, dtype=torch.int32).unflatten(0, (blocks, block))
        j = i[:, :1] + torch.arange(block - self.span, block, dtype=torch.int32)
        padding = first.new_zeros(len(first), self.back)
        first = torch.cat([first, padding], 1).to(torch.int32).unflatten(1, (blocks, block))
        hidden = (j[:, None] < first[..., None]) | (j[:, None] > i[..., None])
        self.bias = q.new_zeros(hidden.shape, dtype=precise).masked_fill_(hidden, -math.inf)
        # Used again for every head: new memory would not be in the cache.
        self._scores = self.buffer()
        self._spans = q.new_empty(blocks, self.span, q.shape[3], dtype=precise)

    def buffer(self) -> Tensor:
        """Memory for the scores of one head, `[n, block, span]`."""
        return torch.empty_like(self.bias[0])

    def heads(self) -> Any:
        """`(b, h, queries [n, block, P], keys [n, P, span], values [n, P, span])` of every head."""
        for b, h in ((b, h) for b in range(len(self.q)) for h in range(self.q.shape[1])):
            g = h // self.share
            spans = (x[b, g].unfold(0, self.span, self.block) for x in (self.k, self.v))
            yield b, h, self.q[b, h].unflatten(0, (-1, self.block)), *spans

    def scores(self, b: int, queries: Tensor, keys: Tensor) -> Tensor:
        """`[n, block, span]`, overwritten by the next head's."""
        bias = self.bias[b if len(self.bias) > 1 else 0]
        return torch.baddbmm(bias, queries, keys, alpha=self.scale, out=self._scores)

    def fold(self, weights: Tensor, rows: Tensor, total: Tensor) -> None:
        """Add `weights^T rows`, the gradient of each block's span, to that of all keys."""
        torch.bmm(weights.mT, rows, out=self._spans)
        count, blocks = len(rows), total.unflatten(0, (-1, self.block))
        for n, part in enumerate(self._spans.unflatten(1, (-1, self.block)).unbind(1)):
            blocks[n : n + count] += part
