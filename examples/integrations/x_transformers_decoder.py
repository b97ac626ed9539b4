"""A decoder of x-transformers with its attention replaced, cached generation included.

    pip install x-transformers
    python examples/integrations/x_transformers_decoder.py

The wrapper's positions stay (here the absolute ones), so the layers get rope_base=None. Their state
takes the place of cached keys and values; beams are reordered by x-transformers as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import Attention, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.attend import Intermediates

from longctx_layers import Projection, build_layer


class LongContextAttention(nn.Module):
    """One of our layers, called as x-transformers calls its attention."""

    def __init__(self, original: Attention, d_model: int, block: str, **options: Any) -> None:
        super().__init__()
        q, o = original.to_q.weight, original.to_out.weight
        head_dim = len(q) // original.heads
        self.layer = build_layer(
            block, d_model, original.heads, rope_base=None, n_kv_heads=original.kv_heads,
            projection=Projection(head_dim=head_dim), device=q.device, dtype=q.dtype, **options,
        )  # fmt: skip
        weights = {"k_proj": original.to_k.weight, "v_proj": original.to_v.weight}
        # Query heads that share a key head stand apart in theirs, and together in ours.
        groups = (original.heads // original.kv_heads, original.kv_heads, head_dim)
        weights["q_proj"] = q.unflatten(0, groups).transpose(0, 1).flatten(0, 2)
        weights["o_proj"] = o.unflatten(1, groups).transpose(1, 2).flatten(1, 3)
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
        # Their cache takes tensors [batch, ..., tokens, dim], reorders rows and trims tokens.
        return y, Intermediates(
            cached_kv=tuple(t.reshape(len(t), 1, t.shape[1:].numel()) for t in state)
        )

    def unpack(self, cache: Intermediates | None, batch_size: int) -> Any:
        """The state in a cache; of blocks whose state has a constant size."""
        if cache is None:
            return None
        shapes = [t.shape for t in self.layer.init_state(batch_size)]
        pairs = zip(cache.cached_kv, shapes, strict=True)
        return self.layer.state_type(*(t.reshape(shape) for t, shape in pairs))


def replace_attention(model: TransformerWrapper, block: str, **options: Any) -> TransformerWrapper:
    """Exchange every self-attention of a decoder, in place."""
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
