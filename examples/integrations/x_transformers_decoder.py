"""Replace the attention of an x-transformers decoder; cached generation works as before.

    pip install x-transformers
    python examples/integrations/x_transformers_decoder.py

The wrapper keeps its positions (here absolute embeddings), so the layers get rope_base=None. Their
state takes the place of cached keys and values, and x-transformers reorders its rows for beams.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from x_transformers import Attention, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.attend import Intermediates

from longctx_layers import Projection, build_layer


class LongContextAttention(nn.Module):
    """A layer of this library with the call of x-transformers' attention."""

    def __init__(self, original: Attention, d_model: int, block: str, **options: Any) -> None:
        super().__init__()
        q = original.to_q.weight
        self.layer = build_layer(
            block,
            d_model,
            original.heads,
            rope_base=None,
            n_kv_heads=original.kv_heads,
            projection=Projection(head_dim=len(q) // original.heads),
            device=q.device,
            dtype=q.dtype,
            **options,
        )
        # There, query head r * kv_heads + g shares key head g; here, the heads of a group are
        # neighbours.
        groups = {"g": original.kv_heads, "r": original.heads // original.kv_heads}
        weights = {
            "q_proj": rearrange(q, "(r g p) d -> (g r p) d", **groups),
            "k_proj": original.to_k.weight,
            "v_proj": original.to_v.weight,
            "o_proj": rearrange(original.to_out.weight, "d (r g p) -> d (g r p)", **groups),
        }
        with torch.no_grad():
            for name, weight in weights.items():
                getattr(self.layer, name).weight.copy_(weight)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Intermediates | None = None,
        return_intermediates: bool = False,
        **unused: Any,
    ) -> Any:
        segment_ids = None
        if mask is not None:
            segment_ids = mask[:, -x.shape[1] :].long() - 1
        y, state = self.layer(x, self.unpack(cache, len(x)), segment_ids=segment_ids)
        if not return_intermediates:
            return y
        # The cache holds tensors [batch, ..., tokens, dim]; x-transformers reorders rows and trims
        # tokens. So each tensor of the state is a single token there.
        cached = tuple(t.reshape(len(t), 1, t.shape[1:].numel()) for t in state)
        return y, Intermediates(cached_kv=cached)

    def unpack(self, cache: Intermediates | None, batch_size: int) -> Any:
        """The state that a cache holds; only for layers whose state has a constant size."""
        if cache is None:
            return None
        shapes = [t.shape for t in self.layer.init_state(batch_size)]
        pairs = zip(cache.cached_kv, shapes, strict=True)
        return self.layer.state_type(*(t.reshape(shape) for t, shape in pairs))


def replace_attention(model: TransformerWrapper, block: str, **options: Any) -> TransformerWrapper:
    """Replace every self-attention of a decoder, in place."""
    stack = model.attn_layers
    for kind, layer in zip(stack.layer_types, stack.layers, strict=True):
        if kind == "a":
            layer[1] = LongContextAttention(layer[1], stack.dim, block, **options)
    return model


def main() -> None:
    torch.manual_seed(0)
    decoder = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16)
    model = TransformerWrapper(num_tokens=256, max_seq_len=1024, attn_layers=decoder)
    ids = torch.randint(0, 256, (2, 40))
    expected = model(ids)
    replace_attention(model, "dpassm", window_size=64, ssm_state_dim=16, fuse="residual")
    print(f"largest difference to full attention: {(model(ids) - expected).abs().max():.1e}")
    text = AutoregressiveWrapper(model).generate(ids[:, :30], 20, temperature=0.0, cache_kv=True)
    print(f"generated {list(text.shape)} tokens")


if __name__ == "__main__":
    main()
