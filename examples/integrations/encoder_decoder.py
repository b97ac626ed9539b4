"""An encoder-decoder model whose decoder uses a layer of this library for self-attention.

    python examples/integrations/encoder_decoder.py

The layers are causal, so they replace the decoder's self-attention only. The bidirectional encoder
and cross-attention stay nn.MultiheadAttention. During decoding, each block has a state, and the
encoder's output is computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longctx_layers import build_layer


class DecoderBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int, block: str, **options: Any) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(d_model)
        self.self_attention = build_layer(block, d_model, n_heads, **options)
        self.cross_norm = nn.LayerNorm(d_model)
        self.cross_attention = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
        )

    def forward(
        self, x: Tensor, memory: Tensor, memory_pads: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        y, state = self.self_attention(self.self_norm(x), state)
        x = x + y
        query = self.cross_norm(x)
        y, _ = self.cross_attention(
            query, memory, memory, key_padding_mask=memory_pads, need_weights=False
        )
        x = x + y
        return x + self.ffn(x), state


class EncoderDecoder(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 2,
        longest_source: int = 512,
        block: str = "dpassm",
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        # For the encoder and cross-attention; the decoder's layers encode positions themselves.
        self.positions = nn.Embedding(longest_source, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, n_heads, 4 * d_model, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.decoder = nn.ModuleList(
            DecoderBlock(d_model, n_heads, block, **options) for _ in range(n_layers)
        )
        self.head = nn.Linear(d_model, vocab_size)

    def encode(self, source: Tensor, pads: Tensor | None = None) -> Tensor:
        x = self.embedding(source) + self.positions.weight[: source.shape[1]]
        return self.encoder(x, src_key_padding_mask=pads)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        memory_pads: Tensor | None = None,
        states: list[Any] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Logits `[B, T, V]` of the token after each target token, and the states of the blocks."""
        x = self.embedding(target)
        new_states = []
        for block, state in zip(self.decoder, states or [None] * len(self.decoder), strict=True):
            x, state = block(x, memory, memory_pads, state)
            new_states.append(state)
        return self.head(x), new_states

    @torch.no_grad()
    def generate(self, source: Tensor, begin: int, length: int) -> Tensor:
        """Greedy decoding of `length` tokens after the token `begin`."""
        memory = self.encode(source)
        states = None
        tokens = [torch.full_like(source[:, :1], begin)]
        for _ in range(length):
            logits, states = self.decode(tokens[-1], memory, states=states)
            tokens.append(logits.argmax(-1))
        return torch.cat(tokens[1:], dim=1)


def main() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(20, window_size=8, ssm_state_dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(200):  # learn to repeat the source; 0 begins the target
        source = torch.randint(1, 20, (16, 12))
        target = torch.cat([torch.zeros(16, 1, dtype=torch.int64), source[:, :-1]], dim=1)
        logits, _ = model.decode(target, model.encode(source))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), source.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    accuracy = (model.generate(source, 0, 12) == source).float().mean()
    print(f"generated {100 * accuracy:.0f} % of the tokens right")


if __name__ == "__main__":
    main()
