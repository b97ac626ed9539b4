"""Window attention, and what layers with a window and global tokens have in common."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.layers.attention import AttentionLayer, Projection
from longctx_layers.layers.base import StateT
from longctx_layers.layers.init import set_first
from longctx_layers.layers.state import Field, cache_tail
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.ops.attention.far import far_block, global_mask, list_starts
from longctx_layers.ops.checks import expect_count, expect_positive


class WindowLayer(AttentionLayer[StateT]):
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
        self.window_size = window_size
        self.n_global_tokens = n_global_tokens
        self.global_k_proj = self.global_v_proj = None
        if n_global_tokens:
            self.global_k_proj = deepcopy(self.k_proj)
            self.global_v_proj = deepcopy(self.v_proj)

    @property
    def split_multiple(self) -> int | None:
        return self.window_size

    @property
    def reach(self) -> int | None:
        return self.window_size

    def set_reach(self, size: int) -> None:
        self.window_size = size

    def keys_per_query(self, length: int) -> float:
        return windowed_keys_per_query(self.window_size, self.n_global_tokens, length)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters; the global projections start as copies of the local ones."""
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
        """Window and global attention: `[B, T, H, P]`, and its tensors of the new state."""
        if not self.n_global_tokens:
            q, k, v = self.project(x, state)
            y = self.attend(q, k, v, segments, window_size=self.window_size)
            nothing = k.new_zeros(len(k), 0, *k.shape[2:])
            kept = cache_tail(k, v, self.window_size - 1, segments)
            return y, {**kept, "global_k": nothing, "global_v": nothing}
        length = x.shape[1]
        if segments is None:
            # One list of keys serves all queries, and the state.
            block = length
            lists = slice(None)
            starts = torch.full((len(x), 1), -offset, device=x.device)
        else:
            # A list for each block of queries, and one for the segment of the next token.
            block = far_block(self.window_size, segments)
            lists = slice(-1)
            starts = list_starts(segments, block)
            starts = torch.cat([starts, segments.next_start()[:, None]], dim=1)
        global_k, global_v = self._global_keys(x, state, segments, starts)
        mask = global_mask(
            self.n_global_tokens, self.window_size, length, segments, block, x.device, offset
        )
        q, k, v = self.project(x, state)
        far = FarKeys(
            q.transpose(1, 2),
            global_k[:, lists].permute(0, 3, 1, 2, 4),
            global_v[:, lists].permute(0, 3, 1, 2, 4),
            mask,
            block,
        )
        y = self.attend(q, k, v, segments, window_size=self.window_size, far=far)
        kept = cache_tail(k, v, self.window_size - 1, segments)
        # Copies, so that the state does not hold on to the other lists.
        kept |= {"global_k": global_k[:, -1].clone(), "global_v": global_v[:, -1].clone()}
        return y, kept

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


def windowed_keys_per_query(window_size: int, n_global_tokens: int, length: int) -> float:
    """How many keys of its window and global tokens before it a query sees on average."""
    near = min(window_size, length)
    mean = near - near * (near - 1) / (2 * length)
    return mean + n_global_tokens * (length - near) / length


class LongformerState(NamedTuple):
    """The window's keys and values, and the segment's global ones: constant in the length.

    Attributes:
        k, v: `[B, window_size - 1, G, P]`, right-aligned, zeros where the segment has fewer.
        global_k, global_v: `[B, n_global_tokens, G, P]`, left-aligned.
        position: `[B]` int64, the position in its segment of the row's next token.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    global_k: Tensor
    global_v: Tensor
    position: Tensor
    segment: Tensor


class WindowAttention(WindowLayer[LongformerState]):
    """Sliding-window attention: every query sees the last `window_size` tokens of its segment.

    Cost per token and state are constant in the length. `Longformer` adds global tokens, and
    `DPASSM` a recurrent memory of all that has left the window.

    >>> layer = WindowAttention(64, 4, window_size=16)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> state.k.shape  # [batch, window_size - 1, key heads, head_dim]
    torch.Size([2, 15, 4, 16])

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        n_global_tokens: first tokens of the segment that every query sees; see `Longformer`.

    Source: Beltagy et al., Longformer, arXiv 2004.05150.
    """

    state_type = LongformerState
    label = "window alone"
    style = ("#D55E00", "X")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window_size: int = 128,
        n_global_tokens: int = 0,
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
        return self.o_proj(y.flatten(2)), kept

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        return {"": {"window_size": 5}, "1": {"window_size": 1}}


# States that were saved when the class was defined in `longformer`.
torch.serialization.add_safe_globals(
    [(LongformerState, "longctx_layers.layers.longformer.LongformerState")]
)
