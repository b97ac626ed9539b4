"""Longformer attention, causal: a window and global tokens."""

from __future__ import annotations

from typing import Any

import torch

from longctx_layers.layers.attention import Projection
from longctx_layers.layers.rotary import RopeScaling
from longctx_layers.layers.window import LongformerState, WindowAttention

__all__ = ["Longformer", "LongformerState"]


class Longformer(WindowAttention):
    """Window attention in which every query also sees the first tokens of its segment.

    For texts whose beginning (an instruction, say) must stay visible at any length. A global token
    outside the window is matched by content, with key and value projections of its own, which
    start as copies of the local ones. The state is constant in the length.

    >>> layer = Longformer(64, 4, window_size=16, n_global_tokens=2)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> state.global_k.shape
    torch.Size([2, 2, 4, 16])

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        n_global_tokens: first tokens of the segment that every query sees. With 0 of them the
            layer is `WindowAttention`.

    Source: Beltagy et al., Longformer, arXiv 2004.05150.
    """

    label = "Longformer"
    style = ("#CC79A7", "D")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window_size: int = 128,
        n_global_tokens: int = 2,
        n_kv_heads: int | None = None,
        rope_base: float | None = 10000.0,
        dropout: float = 0.0,
        projection: Projection | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            window_size=window_size,
            n_global_tokens=n_global_tokens,
            n_kv_heads=n_kv_heads,
            rope_base=rope_base,
            dropout=dropout,
            projection=projection,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        biased = Projection(
            head_dim=6, bias=True, out_bias=True, qk_norm=True, rope_scaling=RopeScaling(3.0, 16)
        )
        return {
            "": {"window_size": 5, "n_global_tokens": 2},
            "biased": {"window_size": 4, "n_global_tokens": 3, "projection": biased},
            "1": {"window_size": 1, "n_global_tokens": 3},
        }
