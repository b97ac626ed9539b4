"""A block of the language model: a layer and a feed-forward layer, each with a residual branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.layers import Layer
from longctx_layers.layers.init import draw_linear, mark_drawn


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: a gated feed-forward layer. `[..., D]` to `[..., D]`."""

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, ffn_dim, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(d_model, ffn_dim, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False, device=device, dtype=dtype)
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.first_scale = 1.0  # type: ignore[assignment]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights, in the way of the layers."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            draw_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`, with RMSNorm and SwiGLU.

    Args:
        mixer: the layer that mixes tokens.
        ffn_dim: hidden width of the SwiGLU.
        dropout: of the SwiGLU's output, in training; the layer has its own.
        norm_eps: epsilon of both norms.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        mixer: Layer[Any],
        ffn_dim: int,
        *,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model = mixer.d_model
        # torch's RMSNorm computes in float32 for half precisions.
        self.mixer_norm = nn.RMSNorm(d_model, norm_eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.ffn_norm = nn.RMSNorm(d_model, norm_eps, device=device, dtype=dtype)
        self.ffn = SwiGLU(d_model, ffn_dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        mark_drawn(self)

    def reset_parameters(self) -> None:
        """Initialise all weights, each part in its own way."""
        for part in (self.mixer_norm, self.mixer, self.ffn_norm, self.ffn):
            part.reset_parameters()
        mark_drawn(self)

    def forward(
        self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """`[B, T, D]` and the layer's state to the same; arguments as for a layer."""
        y, state = self.mixer(self.mixer_norm(x), state, segment_ids=segment_ids)
        x = x + y
        return x + self.dropout(self.ffn(self.ffn_norm(x))), state
