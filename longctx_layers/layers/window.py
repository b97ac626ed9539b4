"""Window attention with global tokens: what Longformer is, and one of DPASSM's two paths."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.base import AttentionLayer, Projection
from longctx_layers.layers.init import set_first
from longctx_layers.layers.state import Field
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.ops.attention.far import far_block, global_mask, list_starts
from longctx_layers.ops.checks import expect_count, expect_positive


class WindowAttention(AttentionLayer):
    """Base of the layers with a window and global tokens; see `Longformer` for the arguments."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window_size: int,
        n_global_tokens: int,
        n_kv_heads: int | None,
        rope_base: float | None,
        dropout: float,
        projection: Projection | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
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
        expect_positive("window_size", window_size)
        expect_count("n_global_tokens", n_global_tokens)
        self.window_size, self.n_global_tokens = window_size, n_global_tokens
        self.grain = window_size
        self.global_k_proj = self.global_v_proj = None
        if n_global_tokens:
            self.global_k_proj, self.global_v_proj = deepcopy(self.k_proj), deepcopy(self.v_proj)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew; the global projections begin as copies of the local ones."""
        super().reset_parameters()
        if self.global_k_proj is not None and self.global_v_proj is not None:
            for copy, own in ((self.global_k_proj, self.k_proj), (self.global_v_proj, self.v_proj)):
                for parameter, value in zip(copy.parameters(), own.parameters(), strict=True):
                    set_first(parameter, value)

    def fields(self) -> dict[str, Field]:
        shape = (self.n_global_tokens, self.n_kv_heads, self.head_dim)
        return {
            **self.cache_fields(self.window_size - 1),
            "global_k": Field(shape),
            "global_v": Field(shape),
        }

    def options(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "n_global_tokens": self.n_global_tokens}

    def attend_window(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Window and global attention: `[B, T, H, P]`, and what the state keeps of it."""
        window = self.window_size
        if self.global_k_proj is None or self.global_v_proj is None:
            y, k, v = self.attend(x, state, segments, window_size=window)
            none = k.new_zeros(len(k), 0, *k.shape[2:])
            return y, {
                **self.cache(k, v, window - 1, segments),
                "global_k": none,
                "global_v": none,
            }
        length, block = x.shape[1], far_block(window, segments)
        if segments is None:
            starts = torch.full((len(x), 1), -offset, device=x.device)
            block = length
        else:
            starts = list_starts(segments, block)
            starts = torch.cat([starts, segments.next_start()[:, None]], dim=1)
        global_k, global_v = self._global_keys(x, state, segments, starts)
        lists = slice(0, 1) if segments is None else slice(0, -1)
        mask = global_mask(self.n_global_tokens, window, length, segments, block, x.device, offset)

        def far(q: Tensor, k: Tensor, v: Tensor) -> FarKeys:
            keys, values = (z[:, lists].permute(0, 3, 1, 2, 4) for z in (global_k, global_v))
            return FarKeys(q, keys, values, mask, block)

        y, k, v = self.attend(x, state, segments, window_size=window, far=far)
        kept = {"global_k": global_k[:, -1].clone(), "global_v": global_v[:, -1].clone()}
        return y, {**self.cache(k, v, window - 1, segments), **kept}

    def _global_keys(
        self, x: Tensor, state: Any, segments: Segments | None, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Global keys and values of the segments that begin at `starts` `[B, M]`.

        Those of earlier calls come from the state; those that this call does not reach are zero.

        Returns:
            Two tensors `[B, M, n_global_tokens, G, P]`.
        """
        assert self.global_k_proj is not None
        assert self.global_v_proj is not None
        index = starts[..., None] + torch.arange(self.n_global_tokens, device=x.device)
        flat = index.clamp(0, x.shape[1] - 1).flatten(1)[..., None].expand(-1, -1, x.shape[2])
        tokens = x.gather(1, flat)
        k, v = (
            self.heads(projection(tokens), self.n_kv_heads).unflatten(1, index.shape[1:])
            for projection in (self.global_k_proj, self.global_v_proj)
        )
        if self.k_norm is not None:
            k = self.k_norm(k)
        index = index[..., None, None]
        here = index < (x.shape[1] if segments is None else segments.length.view(-1, 1, 1, 1, 1))
        k, v = torch.where(here, k, 0), torch.where(here, v, 0)
        if state is not None:
            k = torch.where(index < 0, state.global_k[:, None].to(k.dtype), k)
            v = torch.where(index < 0, state.global_v[:, None].to(v.dtype), v)
        return k, v
