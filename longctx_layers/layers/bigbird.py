"""BigBird attention, causal: a window, global tokens, and random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.base import AttentionLayer, Projection
from longctx_layers.layers.pieces import lengths
from longctx_layers.layers.state import Field
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.ops.attention.far import RANDOM_BLOCK, far_cached_keys
from longctx_layers.ops.checks import expect_count, expect_positive
from longctx_layers.ops.segments import cover


class BigBird(AttentionLayer):
    """Window attention that also sees the segment's first tokens and some random ones.

    Each block of 64 queries draws `n_random_tokens` keys from those between the global tokens and
    the window, by a hash of seed, head and block: they depend on positions alone. Keys outside the
    window are matched by content, without rotary embedding. As they may lie anywhere, the state
    holds all keys and values and grows with every token.

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        n_random_tokens: random keys of each query.
        n_global_tokens: first tokens of the segment that every query sees.
        seed: of the random keys; give each layer of a model its own.

    Source: Zaheer et al., BigBird, arXiv 2007.14062.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window_size: int = 128,
        n_random_tokens: int = 4,
        n_global_tokens: int = 2,
        seed: int = 0,
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
        expect_positive("window_size", window_size)
        expect_count("n_random_tokens", n_random_tokens)
        expect_count("n_global_tokens", n_global_tokens)
        expect_count("seed", seed)
        self.window_size, self.n_random_tokens = window_size, n_random_tokens
        self.n_global_tokens, self.seed = n_global_tokens, seed
        self.reset_parameters()

    def fields(self) -> dict[str, Field]:
        return self.cache_fields(None)

    def options(self) -> dict[str, Any]:
        names = ("window_size", "n_random_tokens", "n_global_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.project(x, state)
        queries, keys, values = (z.transpose(1, 2) for z in (q, k, v))
        far = far_cached_keys(queries, keys, values, **self.options(), segments=segments)
        y = self._attend_in_pieces(q, k, v, segments, far)
        return y.flatten(2), self.cache(k, v, k.shape[1], segments)

    def _attend_in_pieces(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, far: FarKeys | None
    ) -> Tensor:
        """Attention `[B, T, H, P]`, on a CPU a few tokens at a time, so that scores stay in caches.

        Tensors are split once: the gradient of each of many slices would be as large as the whole.
        """
        (batch, length), prefix, reach = q.shape[:2], k.shape[1] - q.shape[1], self.window_size - 1
        sizes = [length]
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            grain = max(1, cover(reach, RANDOM_BLOCK)) * RANDOM_BLOCK
            sizes = lengths(batch, length, grain, 0)
        own = [prefix + sizes[0], *sizes[1:]]
        lists = [None] * len(sizes) if far is None else far.split(sizes)
        offset, ys, before = 0, [], (k[:, :0], v[:, :0])
        for queries, *cached, some in zip(
            q.split(sizes, 1), k.split(own, 1), v.split(own, 1), lists, strict=True
        ):
            keys, values = (torch.cat(z, dim=1) for z in zip(before, cached, strict=True))
            part = segments
            if segments is not None and len(sizes) > 1:
                part = segments.part(offset, queries.shape[1])
            ys.append(self._attend_piece(queries, keys, values, part, some))
            before = tuple(z[:, max(z.shape[1] - reach, 0) :] for z in cached)
            offset += queries.shape[1]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)

    def _attend_piece(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, far: FarKeys | None
    ) -> Tensor:
        def unrotated(queries: Tensor, *_: Tensor) -> FarKeys | None:
            return None if far is None else far._replace(q=queries)

        return self.attend_to(q, k, v, segments, window_size=self.window_size, far=unrotated)
