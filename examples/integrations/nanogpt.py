"""A GPT in the manner of nanoGPT, and the three lines that change when its attention is ours.

    python examples/integrations/nanogpt.py

The class `CausalSelfAttention` becomes a layer; `Block` and `GPT` hand its state on, so that
generation costs one step a token. There is no block_size: no table of positions, no limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers import build_layer


@dataclass
class GPTConfig:
    vocab_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block: str = "dpassm"
    window_size: int = 32


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        # was: self.attn = CausalSelfAttention(config)
        self.attn = build_layer(
            config.block, config.n_embd, config.n_head, window_size=config.window_size
        )
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
        )

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.attn(self.ln_1(x), state)  # was: x = x + self.attn(self.ln_1(x))
        x = x + y
        return x + self.mlp(self.ln_2(x)), state


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=config.n_embd**-0.5)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, states: list[Any] | None = None
    ) -> tuple[Tensor, Tensor | None, list[Any]]:
        x, new = self.wte(idx), []
        for block, state in zip(self.h, states or [None] * len(self.h), strict=True):
            x, state = block(x, state)
            new.append(state)
        logits = self.lm_head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss, new

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """The likeliest continuation of `[B, T]`; the prompt is read once."""
        logits, _, states = self(idx)
        for n in range(max_new_tokens):
            idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
            if n + 1 < max_new_tokens:
                logits, _, states = self(idx[:, -1:], states=states)
        return idx


def main() -> None:
    torch.manual_seed(0)
    model, text = GPT(GPTConfig(n_layer=2, n_embd=64)), b"the quick brown fox. " * 40
    ids = torch.tensor(list(text))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        _, loss, _ = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(bytes(model.generate(ids[:, :30], 42)[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
