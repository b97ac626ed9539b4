"""nanoGPT with a layer of this library: three lines change, and generation takes constant memory.

    python examples/integrations/nanogpt.py

The class `CausalSelfAttention` becomes a layer. `Block` and `GPT` pass its state through, and with
`advance` the library's `generate` serves the model. There is no block_size, since there is no table
of positions: sequences may have any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers import build_layer
from longctx_layers.lm.generation import generate


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

    def forward(
        self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        # was: x = x + self.attn(self.ln_1(x))
        y, state = self.attn(self.ln_1(x), state, segment_ids=segment_ids)
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
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        states: list[Any] | None = None,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Any]]:
        x = self.wte(idx)
        new_states = []
        for block, state in zip(self.h, states or [None] * len(self.h), strict=True):
            x, state = block(x, state, segment_ids)
            new_states.append(state)
        logits = self.lm_head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss, new_states

    # The protocol of `generate`: vocab_size, device and advance.

    @property
    def vocab_size(self) -> int:
        return self.wte.num_embeddings

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def advance(
        self, ids: Tensor, state: list[Any] | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, list[Any]]:
        logits, _, states = self(ids, states=state, segment_ids=segment_ids)
        return logits[:, -1], states


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=64))
    ids = torch.tensor(list(b"the quick brown fox. " * 40))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        _, loss, _ = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    text = generate(model, ids[0, :30], 42, temperature=0)
    print(bytes(text.tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
