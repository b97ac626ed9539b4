"""The oracles: each operation's definition, step by step, and nothing else.

They share no code with the fast paths, compute token by token in the state's precision, and take
time and memory that no fast path may take. Their parameters are those of every backend.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

if TYPE_CHECKING:
    from longctx_layers.ops.attention.far import FarKeys
    from longctx_layers.ops.attention.pattern import Pattern
    from longctx_layers.ops.segments import Segments
    from longctx_layers.ops.state_space.tiles import SSDInputs


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """`longctx_layers.ops.sparse_attention` with every score, masked by the definition."""
    window_size, chunk_size, chunk_shift, segments = pattern
    dtype = q.dtype
    batch, heads, length, _ = q.shape
    prefix = k.shape[2] - length
    share = heads // k.shape[1]
    precise = torch.promote_types(dtype, torch.float32)
    q = q.to(precise)
    k = repeat(k.to(precise), "b g s p -> b (g share) s p", share=share)
    v = repeat(v.to(precise), "b g s p -> b (g share) s p", share=share)
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
    if far is None:
        return (F.dropout(scores.softmax(-1), dropout_p) @ v).to(dtype)
    lists = torch.arange(length, device=q.device) // far.block
    far_k = repeat(far.k[:, :, lists].to(precise), "b g t f p -> b (g share) t f p", share=share)
    far_v = repeat(far.v[:, :, lists].to(precise), "b g t f p -> b (g share) t f p", share=share)
    far_scores = torch.einsum("bhtp,bhtfp->bhtf", far.q.to(precise), far_k) * scale
    far_share = share if far.mask.shape[1] > 1 else 1
    mask = repeat(far.mask, "b g t f -> b (g share) t f", share=far_share)
    far_scores = far_scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(torch.cat([scores, far_scores], -1).softmax(-1), dropout_p)
    near_weights, far_weights = weights.split([k.shape[2], far.k.shape[3]], -1)
    y = near_weights @ v + torch.einsum("bhtf,bhtfp->bhtp", far_weights, far_v)
    return y.to(dtype)


def ssd(
    inputs: SSDInputs, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """`longctx_layers.ops.ssd` as its recurrence."""
    h = initial_state
    x, dt, A, B, C = (z.to(h.dtype) for z in inputs)
    ys = []
    for t in range(x.shape[1]):
        if segments is not None:
            h = torch.where(_begins(segments, t), 0, h)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        write = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        h = _unless_pad(segments, t, decay * h + write, h)
        ys.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]))
    return torch.stack(ys, 1).to(inputs.x.dtype), h


def block_ssd(
    inputs: SSDInputs,
    *,
    chunk_size: int,
    chunk_shift: int,
    initial_state: tuple[Tensor, Tensor],
    segments: Segments | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`longctx_layers.ops.block_ssd` as its recurrence over the readable and pending states."""
    readable, pending = initial_state
    x, dt, A, B, C = (z.to(readable.dtype) for z in inputs)
    batch, length = x.shape[:2]
    ys = []
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
    return torch.stack(ys, 1).to(inputs.x.dtype), pass_boundary(position, readable, pending)


def diagonal_scan(
    u: Tensor, log_decay: Tensor, *, initial_state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """`longctx_layers.ops.diagonal_scan` as its recurrence."""
    h = initial_state
    hs = []
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
    width = weight.shape[1]
    length = x.shape[1]
    precise = torch.promote_types(x.dtype, torch.float32)
    if before is None:
        before = x.new_zeros(len(x), width - 1, x.shape[2])
    known = torch.cat([before, x], 1).to(precise)
    ys = []
    for t in range(length):
        recent = known[:, t : t + width]
        if segments is not None:
            index = torch.arange(t - width + 1, t + 1, device=x.device)
            same_segment = index >= segments.start[:, t, None]
            recent = torch.where(same_segment[..., None], recent, 0)
        y = torch.einsum("bnc,cn->bc", recent, weight.to(precise))
        ys.append(y / (1 + torch.exp(-y)))
    return torch.stack(ys, 1).to(x.dtype)


def gated_norms(z: Tensor, o: Tensor, s: Tensor, weight_o: Tensor, weight_s: Tensor) -> Tensor:
    """`longctx_layers.ops.gated_norms` as its formula."""
    precise = torch.promote_types(z.dtype, torch.float32)
    gate = 1 / (1 + torch.exp(-z.to(precise)))
    o, s = (
        x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for x in (o.to(precise), s.to(precise))
    )
    return (gate * o * weight_o.to(precise) + (1 - gate) * s * weight_s.to(precise)).to(z.dtype)


def _begins(segments: Segments, t: int) -> Tensor:
    """`[B, 1, 1, 1]`: whether token t is real and begins a segment."""
    begins = (segments.start[:, t] == t) & (t < segments.length)
    return begins[:, None, None, None]


def _unless_pad(segments: Segments | None, t: int, new: Tensor, old: Tensor) -> Tensor:
    if segments is None:
        return new
    real = (t < segments.length).view(-1, *[1] * (new.dim() - 1))
    return torch.where(real, new, old)
