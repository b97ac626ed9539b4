"""Attention from torch and other libraries, each with an equivalent built from our layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.speed.common import Shape
from longctx_layers import CausalAttention, Longformer
from longctx_layers.layers import AttentionLayer

Function = Callable[[Tensor], Tensor]


class Projected(nn.Module):
    """Self-attention as one writes it in plain torch: projections around `attend(q, k, v)`."""

    def __init__(self, shape: Shape, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.attend = attend
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = rearrange(self.qkv(x), "b t (qkv h p) -> qkv b h t p", qkv=3, h=self.n_heads)
        y = self.attend(*heads)
        return self.out(rearrange(y, "b h t p -> b t (h p)"))


def with_weights(layer: AttentionLayer[Any], qkv: list[Tensor], out: Tensor) -> Function:
    """Our layer with these weights in its projections."""
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    for projection, weight in zip(projections, [*qkv, out], strict=True):
        projection.load_state_dict({"weight": weight.detach()})
    return lambda x: layer(x)[0]


def build_sdpa(shape: Shape) -> nn.Module:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Projected(shape, attend)


def build_masked_sdpa(shape: Shape) -> nn.Module:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, mask.tril_().triu_(1 - shape.local))

    return Projected(shape, attend)


def build_flex(shape: Shape) -> nn.Module:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < shape.local)

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}  # one for each length, made in advance as users do

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(window, None, None, length, length, q.device.type)
        return compiled(q, k, v, block_mask=masks[length])

    return Projected(shape, attend)


def our_full(peer: Projected, shape: Shape) -> Function:
    layer = CausalAttention(shape.d_model, shape.n_heads, rope_base=None)
    return with_weights(layer, list(peer.qkv.weight.chunk(3)), peer.out.weight)


def our_window(peer: Projected, shape: Shape) -> Function:
    layer = Longformer(
        shape.d_model, shape.n_heads, window_size=shape.local, n_global_tokens=0, rope_base=None
    )
    return with_weights(layer, list(peer.qkv.weight.chunk(3)), peer.out.weight)


def build_local_attention(shape: Shape) -> nn.Module:
    from local_attention import LocalMHA

    return LocalMHA(
        dim=shape.d_model,
        window_size=shape.local,
        heads=shape.n_heads,
        dim_head=shape.d_model // shape.n_heads,
        causal=True,
    )


def our_local_attention(peer: Any, shape: Shape) -> Function:
    # Its window does not count the query's own key; ours does.
    layer = Longformer(shape.d_model, shape.n_heads, window_size=shape.local + 1, n_global_tokens=0)
    return with_weights(layer, list(peer.to_qkv.weight.chunk(3)), peer.to_out.weight)


def build_x_transformers(shape: Shape) -> nn.Module:
    from x_transformers.x_transformers import Attention

    return Attention(
        shape.d_model,
        dim_head=shape.d_model // shape.n_heads,
        heads=shape.n_heads,
        causal=True,
        flash=True,
    )


def our_x_transformers(peer: Any, shape: Shape) -> Function:
    layer = CausalAttention(shape.d_model, shape.n_heads, rope_base=None)
    qkv = [z.weight for z in (peer.to_q, peer.to_k, peer.to_v)]
    return with_weights(layer, qkv, peer.to_out.weight)
