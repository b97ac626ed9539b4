"""Longformer attention, causal: a window and global tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.layers.base import Projection
from longctx_layers.layers.window import WindowAttention
from longctx_layers.ops import Segments


class LongformerState(NamedTuple):
    """The window's keys and values, and the segment's global ones.

    Attributes:
        k, v: `[B, window_size - 1, G, P]`, right-aligned, zeros where the segment has fewer.
        global_k, global_v: `[B, n_global_tokens, G, P]`, left-aligned.
        position: `[B]` int64, where in its segment the row's next token will stand.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    global_k: Tensor
    global_v: Tensor
    position: Tensor
    segment: Tensor


class Longformer(WindowAttention):
    """Window attention that also sees the first tokens of its segment; constant state.

    `y, state = layer(x, state=None, *, segment_ids=None)`, x and y `[B, T, d_model]`. A global
    token outside the window is matched by content, with key and value projections of its own
    (they begin as copies of the local ones). With `n_global_tokens=0` they do not exist, and this
    is plain window attention, which the registry calls `window`.

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        n_global_tokens: first tokens of the segment that every query sees.

    Source: Beltagy et al., Longformer, arXiv 2004.05150.
    """

    state_type = LongformerState

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
        self.reset_parameters()

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, kept = self.attend_window(x, state, segments, offset)
        return y.flatten(2), kept
