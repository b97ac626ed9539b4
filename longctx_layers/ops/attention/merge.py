"""One softmax over two sets of keys: the far part, and the merge with a near part by log-sum-exp.

A library's kernel runs the range; the far keys, few per query, are dense products here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops.attention.far import FarKeys


def far_attention(far: FarKeys, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the far keys alone, in float32 at least.

    Returns:
        Outputs `[B, H, T, P]` and log-sum-exps `[B, H, T]` of the scores. Where a query sees no far
        key both are finite, and the log-sum-exp is so low that `merge` gives the output no weight.
    """
    heads, length = far.q.shape[1:3]
    groups, lists = far.k.shape[1:3]
    share, block = heads // groups, far.block if lists > 1 else length
    precise = torch.promote_types(far.q.dtype, torch.float32)
    pad = (0, 0, 0, lists * block - length)
    # The query heads of a group are rows of one product, so that no key is copied.
    q = F.pad(far.q.to(precise) * scale, pad).unflatten(2, (lists, block))
    q = q.unflatten(1, (groups, share)).transpose(2, 3).flatten(3, 4)  # [B, G, L, share * block, P]
    scores = (q @ far.k.to(precise).mT).unflatten(3, (share, block))
    mask = F.pad(far.mask, pad).unflatten(2, (lists, block))[:, :, :, None]
    # Not -inf, whose log-sum-exp has no gradient.
    scores = scores.masked_fill(~mask, torch.finfo(precise).min)
    weights = F.dropout(scores.softmax(-1), dropout_p)  # [B, G, L, share, block, F]
    y = (weights.flatten(3, 4) @ far.v.to(precise)).unflatten(3, (share, block))

    def rows(x: Tensor) -> Tensor:  # [B, G, L, share, block, ...] -> [B, H, T, ...]
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :length]

    return rows(y), rows(scores.logsumexp(-1))


def merge(y: Tensor, lse: Tensor, far_y: Tensor, far_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both sets of keys out of the attention over each.

    Args:
        y, far_y: outputs `[..., P]`.
        lse, far_lse: log-sum-exps `[...]` of the scores.

    Returns:
        The output in y's dtype, and the log-sum-exp of all scores.
    """
    weight = torch.sigmoid(far_lse - lse)[..., None]
    merged = torch.lerp(y.to(weight.dtype), far_y.to(weight.dtype), weight)
    return merged.to(y.dtype), torch.logaddexp(lse, far_lse)
