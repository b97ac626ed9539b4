"""Full causal attention: the baseline whose state and cost grow with the length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.attention import AttentionLayer, KeyValueState, Projection
from longctx_layers.layers.state import Field, cache_tail
from longctx_layers.ops import Segments


class CausalAttention(AttentionLayer[KeyValueState]):
    """Full attention to all earlier tokens of the segment, the baseline for the other layers.

    Its state holds all keys and values, so that it grows with every token, padding included.

    >>> layer = CausalAttention(64, 4)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> y, state = layer(torch.randn(2, 1, 64), state)  # the next token of each row

    Args:
        d_model: width of x.
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of n_heads; n_heads by default.
        rope_base: base of the rotary embedding's wavelengths; None for no positions.
        dropout: of the attention weights and of the output, in training.
        projection: shapes of the projections that differ from the usual ones.
        device, dtype: of the parameters.

    Source: Vaswani et al., arXiv 1706.03762.
    """

    state_type = KeyValueState
    label = "vanilla (full attention)"
    style = ("#000000", "s")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
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
            n_kv_heads=n_kv_heads,
            rope_base=rope_base,
            dropout=dropout,
            projection=projection,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def fields(self) -> dict[str, Field]:
        return self.cache_fields(None)

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.project(x, state)
        y = self.attend(q, k, v, segments)
        return self.o_proj(y.flatten(2)), cache_tail(k, v, k.shape[1], segments)

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        return {"": {}, "no-rope": {"rope_base": None}}
