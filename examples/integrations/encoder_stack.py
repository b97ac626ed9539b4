"""Replace the attention of torch's nn.TransformerEncoder, so that its cost is linear.

    python examples/integrations/encoder_stack.py

`replace_attention` copies the weights of every nn.MultiheadAttention, so it also works on a trained
causal model. The stack is called as before, with `src_key_padding_mask` if there is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from longctx_layers import Projection, build_layer


def layer_from(attention: nn.MultiheadAttention, block: str, **options: Any) -> nn.Module:
    """A causal layer with the weights of an nn.MultiheadAttention, and no position encoding."""
    if not attention._qkv_same_embed_dim or attention.bias_k is not None:
        raise ValueError("attention: expected self-attention with in_proj_weight, without bias_kv")
    has_bias = attention.in_proj_bias is not None
    layer = build_layer(
        block,
        attention.embed_dim,
        attention.num_heads,
        rope_base=None,
        dropout=attention.dropout,
        projection=Projection(bias=has_bias, out_bias=has_bias),
        **options,
    )
    parts = {"weight": rearrange(attention.in_proj_weight, "(qkv o) i -> qkv o i", qkv=3)}
    if has_bias:
        parts["bias"] = rearrange(attention.in_proj_bias, "(qkv o) -> qkv o", qkv=3)
    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
        projection = layer.get_submodule(name)
        projection.load_state_dict({key: part[n] for key, part in parts.items()})
    layer.get_submodule("o_proj").load_state_dict(attention.out_proj.state_dict())
    return layer.to(attention.out_proj.weight).train(attention.training)


class CausalSelfAttention(nn.Module):
    """A layer of this library with the call of nn.MultiheadAttention for self-attention."""

    # nn.TransformerEncoder reads these. Without a bias it never takes its fused path.
    batch_first = True
    _qkv_same_embed_dim = True
    in_proj_bias = None

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
            raise ValueError(
                "expected self-attention, got other keys; keep nn.MultiheadAttention there"
            )
        segment_ids = None
        if key_padding_mask is not None:
            is_padding = key_padding_mask
            if is_padding.is_floating_point():  # the stack turns booleans into 0 and -inf
                is_padding = is_padding < 0
            segment_ids = -is_padding.long()
        y, _ = self.layer(query, segment_ids=segment_ids)
        return y, None


def replace_attention(
    encoder: nn.TransformerEncoder, block: str, **options: Any
) -> nn.TransformerEncoder:
    """Replace the attention of every layer, in place."""
    for layer in encoder.layers:
        if not layer.self_attn.batch_first:
            raise ValueError("encoder: expected batch_first=True, got False; build it with that")
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
