"""Sparse attention whose range runs on the flash-attn library: version 2, or 4 (flash-attn-4).

The library knows causal windows over sequences, packed one behind the other where they differ in
length. So a call is cut where segments and chunks begin, and each piece is such a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx_layers.ops.attention import flash_support
from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.attention.merge import far_attention, merge
from longctx_layers.ops.segments import Segments, range_start


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
    """`longctx_layers.ops.sparse_attention` on flash-attn."""
    (batch, _, length, dim), prefix = q.shape, k.shape[2] - q.shape[2]
    version, _ = flash_support.choose(q, dropout_p)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    packed = segments is not None or chunk_size is not None

    def lay(x: Tensor) -> Tensor:  # [B, h, n, ...] -> [B, n, h, ...], or [B * n, h, ...] if packed
        return x.transpose(1, 2).flatten(0, 1) if packed else x.transpose(1, 2)

    def widen(x: Tensor) -> Tensor:  # the kernels take multiples of 8
        return F.pad(x, (0, -dim % 8)) if dim % 8 else x

    q, k, v = (lay(widen(x)) for x in (q, k, v))
    if packed:
        cut = pieces(batch, length, prefix, segments, chunk_size, chunk_shift, q.device)
        if cut.kept is not None:
            k, v = (x.index_select(0, cut.kept) for x in (k, v))
        options |= {"cu_seqlens_q": cut.queries, "cu_seqlens_k": cut.keys}
        options |= {"max_seqlen_q": cut.most_queries, "max_seqlen_k": cut.most_keys}
    distant = None
    if far is not None:
        far_y, far_lse = far_attention(far, dropout_p, scale)
        distant = lay(widen(far_y)), lay(far_lse)
    # The library counts the keys before the query's own, and lets the last query meet the last key.
    before = None if window_size is None else window_size - 1
    if version == 4:
        y = _version_4(q, k, v, distant, before, options)
    else:
        y = _version_2(q, k, v, distant, before, options, dropout_p)
    y = y.unflatten(0, (batch, length)) if packed else y
    return y[..., :dim].transpose(1, 2)


class Pieces(NamedTuple):
    """A call as sequences of queries that see keys of their own sequence alone.

    Attributes:
        queries, keys: `[N + 1]` int32, where each sequence begins among the `B * T` queries and
            among the kept keys, and the total.
        most_queries, most_keys: of one sequence.
        kept: indices of the kept keys among the `B * S`, None if all are kept.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    kept: Tensor | None


def pieces(
    batch: int,
    length: int,
    prefix: int,
    segments: Segments | None,
    chunk_size: int | None,
    chunk_shift: int,
    device: torch.device,
) -> Pieces:
    """Cut a call of `prefix` cached keys and `length` tokens where segments and chunks begin."""
    # Sizes of segments are data, for which the GPU is waited. Chunks alone are counted here.
    source = torch.device("cpu") if segments is None else device
    first = range_start(
        length,
        segments,
        prefix=prefix,
        window_size=None,
        chunk_size=chunk_size,
        chunk_shift=chunk_shift,
        device=source,
    ).expand(batch, -1)
    # Along a row, the first key stays what it is until it jumps to the query's own.
    begins = first == torch.arange(length, device=source)
    begins[:, 0] = True
    begin = begins.flatten().nonzero().flatten()
    queries = F.pad(begin, (0, 1), value=batch * length)
    # Cached keys stand before the first piece of their row.
    cached = torch.where(begin % length == 0, -first.flatten()[begin], 0)
    keys = F.pad((queries.diff() + cached).cumsum(0), (1, 0))
    sizes = [queries.diff().max(), keys.diff().max(), keys[-1]]
    most_queries, most_keys, total = torch.stack(sizes).tolist()
    kept = None
    if total < batch * (prefix + length):
        seen = torch.arange(-prefix, length, device=source) >= first[:, :1]
        kept = seen.flatten().nonzero().flatten().to(device)
    queries, keys = (x.to(device, torch.int32) for x in (queries, keys))
    return Pieces(queries, keys, most_queries, most_keys, kept)


def _version_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distant: tuple[Tensor, Tensor] | None,
    before: int | None,
    options: dict[str, Any],
) -> Tensor:
    """Its log-sum-exp has a gradient, so that autograd goes through the merge."""
    from flash_attn import cute

    function = cute.flash_attn_varlen_func if "cu_seqlens_q" in options else cute.flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    y, lse = function(
        q,
        k,
        v,
        window_size=(before, 0),
        deterministic=deterministic,
        return_lse=distant is not None,
        **options,
    )
    if distant is not None:
        y, _ = merge(y, lse.mT, *distant)
    result: Tensor = y
    return result


def _version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distant: tuple[Tensor, Tensor] | None,
    before: int | None,
    options: dict[str, Any],
    dropout_p: float,
) -> Tensor:
    import flash_attn

    left, options = -1 if before is None else before, {**options, "dropout_p": dropout_p}
    result: Tensor
    if distant is not None:
        options |= {"window_size_left": left, "window_size_right": 0}
        options |= {"softcap": 0.0, "alibi_slopes": None}
        result = _Merged.apply(q, k, v, *distant, options)
        return result
    packed = "cu_seqlens_q" in options
    function = flash_attn.flash_attn_varlen_func if packed else flash_attn.flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    result = function(q, k, v, window_size=(left, 0), deterministic=deterministic, **options)
    return result


class _Merged(torch.autograd.Function):
    """Near and far part as one, for version 2, whose log-sum-exp has no gradient.

    Its backward takes the output and the log-sum-exp of the softmax for which it makes gradients.
    Given those of both parts together, its weights and its row sums of dy * y are theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_y: Tensor,
        far_lse: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        from flash_attn import flash_attn_interface as low

        packed = "cu_seqlens_q" in options
        forward = low._flash_attn_varlen_forward if packed else low._flash_attn_forward
        y, lse, _, random = forward(q, k, v, **options, return_softmax=False)
        y, lse = merge(y, lse.mT, far_y, far_lse)
        ctx.save_for_backward(q, k, v, far_y, far_lse, y, lse, random)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from flash_attn import flash_attn_interface as low

        q, k, v, far_y, far_lse, y, lse, random = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        packed = "cu_seqlens_q" in ctx.options
        backward = low._flash_attn_varlen_backward if packed else low._flash_attn_backward
        backward(
            dy,
            q,
            k,
            v,
            y,
            lse.mT.contiguous(),
            dq,
            dk,
            dv,
            **ctx.options,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=random,
        )
        d_far_y = (far_lse - lse).exp()[..., None] * dy
        return dq, dk, dv, d_far_y, (d_far_y * (far_y - y)).sum(-1), None
