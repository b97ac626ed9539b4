"""The oracles: each operation's definition, step by step, and nothing else.

They share no code with the fast paths, work token by token in the state's precision, and take time
and memory that no fast path may take.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from longctx_layers.ops.attention.far import FarKeys
    from longctx_layers.ops.segments import Segments


def sparse_attention(
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
    """`longctx_layers.ops.sparse_attention` with every score, masked by the definition."""
    dtype = q.dtype
    batch, heads, length, _ = q.shape
    prefix, share = k.shape[2] - length, heads // k.shape[1]
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(precise), *(x.to(precise).repeat_interleave(share, 1) for x in (k, v))
    i = torch.arange(length, device=q.device)[:, None]
    j = torch.arange(-prefix, length, device=q.device)
    start = i.new_full((batch, length), -prefix) if segments is None else segments.start
    origin = 0 if segments is None else start[..., None]
    sees = (j <= i) & (j >= start[..., None])
    if window_size is not None:
        sees = sees & (i - window_size < j)
    if chunk_size is not None:
        chunk_of_query = torch.floor((i - origin - chunk_shift) / chunk_size)
        chunk_of_key = torch.floor((j - origin - chunk_shift) / chunk_size)
        sees = sees & (chunk_of_query == chunk_of_key)
    scores = (q @ k.mT * scale).masked_fill(~sees[:, None], -math.inf)
    if far is not None:
        lists = torch.arange(length, device=q.device) // far.block
        far_k, far_v = (
            x[:, :, lists].to(precise).repeat_interleave(share, 1) for x in (far.k, far.v)
        )  # [B, H, T, F, P]
        mask = far.mask
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(share, 1)
        distant = torch.einsum("bhtp,bhtfp->bhtf", far.q.to(precise), far_k) * scale
        distant = distant.masked_fill(~mask, -math.inf)
        weights = F.dropout(torch.cat([scores, distant], -1).softmax(-1), dropout_p)
        near, distant = weights.split([k.shape[2], far.k.shape[3]], -1)
        y = near @ v + torch.einsum("bhtf,bhtfp->bhtp", distant, far_v)
    else:
        y = F.dropout(scores.softmax(-1), dropout_p) @ v
    return y.to(dtype)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """`longctx_layers.ops.ssd` as its recurrence."""
    h, dtype, ys = initial_state, x.dtype, []
    x, dt, A, B, C = (z.to(h.dtype) for z in (x, dt, A, B, C))
    for t in range(x.shape[1]):
        if segments is not None:
            h = torch.where(_begins(segments, t), 0, h)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        write = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        h = _unless_pad(segments, t, decay * h + write, h)
        ys.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]))
    return torch.stack(ys, 1).to(dtype), h


def block_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`longctx_layers.ops.block_ssd` as its recurrence, with what is readable and pending."""
    readable, pending = initial_state
    dtype, ys = x.dtype, []
    x, dt, A, B, C = (z.to(readable.dtype) for z in (x, dt, A, B, C))
    batch, length = x.shape[:2]
    position = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if segments is not None and length:
        position = -segments.start[:, 0]

    def pass_boundary(at: Tensor, readable: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        begins = ((at - chunk_shift) % chunk_size == 0)[:, None, None, None]
        return torch.where(begins, readable + pending, readable), torch.where(begins, 0, pending)

    for t in range(length):
        if segments is not None:
            begins = _begins(segments, t)
            position = torch.where(begins.flatten(), 0, position)
            readable, pending = (torch.where(begins, 0, z) for z in (readable, pending))
        readable, pending = pass_boundary(position, readable, pending)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        write = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        readable = _unless_pad(segments, t, decay * readable, readable)
        pending = _unless_pad(segments, t, decay * pending + write, pending)
        position = _unless_pad(segments, t, position + 1, position)
        ys.append(torch.einsum("bhpn,bn->bhp", readable, C[:, t]))
    return torch.stack(ys, 1).to(dtype), pass_boundary(position, readable, pending)


def diagonal_scan(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """`longctx_layers.ops.diagonal_scan` as its recurrence."""
    h, hs = initial_state, []
    decay = torch.exp(log_decay.to(h.dtype)).expand(u.shape)
    for t in range(u.shape[1]):
        if segments is not None:
            h = torch.where(_begins(segments, t)[..., 0, 0], 0, h)
        h = _unless_pad(segments, t, decay[:, t] * h + u[:, t].to(h.dtype), h)
        hs.append(h)
    return torch.stack(hs, 1).to(u.dtype), h


def conv_silu(
    x: Tensor, weight: Tensor, *, before: Tensor | None, segments: Segments | None
) -> Tensor:
    """`longctx_layers.ops.conv_silu` token by token, over the last few inputs of its segment."""
    width, length = weight.shape[1], x.shape[1]
    precise = torch.promote_types(x.dtype, torch.float32)
    if before is None:
        before = x.new_zeros(len(x), width - 1, x.shape[2])
    known, ys = torch.cat([before, x], 1).to(precise), []
    for t in range(length):
        recent, index = known[:, t : t + width], torch.arange(t - width + 1, t + 1, device=x.device)
        if segments is not None:
            own = index >= segments.start[:, t, None]
            recent = torch.where(own[..., None], recent, 0)
        y = torch.einsum("bnc,cn->bc", recent, weight.to(precise))
        ys.append(y / (1 + torch.exp(-y)))
    return torch.stack(ys, 1).to(x.dtype)


def gated_norms(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    """`longctx_layers.ops.gated_norms` as its formula."""
    dtype, precise = z.dtype, torch.promote_types(z.dtype, torch.float32)
    z, *paths = (x.to(precise) for x in (z, o, s))
    o, s = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in paths)
    gate = 1 / (1 + torch.exp(-z))
    return (gate * o * weight_o.to(precise) + (1 - gate) * s * weight_s.to(precise)).to(dtype)


def _begins(segments: Segments, t: int) -> Tensor:
    """`[B, 1, 1, 1]`: whether token t is real and begins a segment."""
    begins = (segments.start[:, t] == t) & (t < segments.length)
    return begins[:, None, None, None]


def _unless_pad(segments: Segments | None, t: int, new: Tensor, old: Tensor) -> Tensor:
    if segments is None:
        return new
    real = (t < segments.length).view(-1, *[1] * (new.dim() - 1))
    return torch.where(real, new, old)
