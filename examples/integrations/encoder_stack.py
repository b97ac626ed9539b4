"""torch's own nn.TransformerEncoder, made causal and linear: only its attention is exchanged.

    python examples/integrations/encoder_stack.py

`replace_attention` takes the weights of every nn.MultiheadAttention over, so it serves a trained
model as well. The stack is called as before; `src_key_padding_mask` goes on working.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longctx_layers import Projection, build_layer


def layer_from(attention: nn.MultiheadAttention, block: str, **options: Any) -> nn.Module:
    """A causal layer with the projections of an nn.MultiheadAttention, which has no positions."""
    if not attention._qkv_same_embed_dim or attention.bias_k is not None:
        raise ValueError("attention: expected self-attention with in_proj_weight, without bias_kv")
    biased = attention.in_proj_bias is not None
    layer = build_layer(
        block, attention.embed_dim, attention.num_heads, rope_base=None,
        dropout=attention.dropout, projection=Projection(bias=biased, out_bias=biased), **options,
    )  # fmt: skip
    with torch.no_grad():
        for n, part in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            part.weight.copy_(attention.in_proj_weight.chunk(3)[n])
            if biased:
                part.bias.copy_(attention.in_proj_bias.chunk(3)[n])
        layer.o_proj.load_state_dict(attention.out_proj.state_dict())
    return layer.to(attention.out_proj.weight).train(attention.training)


class CausalSelfAttention(nn.Module):
    """One of our layers, called as nn.MultiheadAttention is for self-attention."""

    # What nn.TransformerEncoder looks at; without a bias it never takes its fused path.
    batch_first, _qkv_same_embed_dim, in_proj_bias = True, True, None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ValueError("expected self-attention, got other keys: leave cross-attention alone")
        segment_ids = None
        if (pads := key_padding_mask) is not None:
            # True at pads, or -inf once a stack has passed it on.
            segment_ids = -(pads < 0 if pads.is_floating_point() else pads).long()
        y, _ = self.layer(query, segment_ids=segment_ids)
        return y, None


def replace_attention(
    encoder: nn.TransformerEncoder, block: str, **options: Any
) -> nn.TransformerEncoder:
    """Exchange the attention of every layer, in place."""
    for layer in encoder.layers:
        if not layer.self_attn.batch_first:
            raise ValueError("encoder: expected batch_first=True, as our layers have it")
        layer.self_attn = CausalSelfAttention(layer_from(layer.self_attn, block, **options))
    return encoder


def main() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 40, 64)
    mask = nn.Transformer.generate_square_subsequent_mask(40)
    expected = encoder(x, mask=mask, is_causal=True)
    replace_attention(encoder, "dpassm", window_size=64, ssm_state_dim=16, fuse="residual")
    print(f"largest difference to full attention: {(encoder(x) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
