"""BigBird attention, causal: a window, global tokens, and random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.attention import AttentionLayer, KeyValueState, Projection
from longctx_layers.layers.splitting import split_lengths
from longctx_layers.layers.state import Field, cache_tail
from longctx_layers.layers.window import windowed_keys_per_query
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.ops.attention.far import RANDOM_BLOCK, far_cached_keys
from longctx_layers.ops.checks import expect_count, expect_positive
from longctx_layers.ops.segments import cover


class BigBird(AttentionLayer[KeyValueState]):
    """Window attention in which queries also see global tokens and a few random earlier ones.

    Time is linear in the length, but the state grows with it: random keys may lie anywhere, so
    that all keys and values are kept. Each block of 64 queries draws `n_random_tokens` keys from
    those between the global tokens and the window, by a hash of seed, head and block, so that they
    depend on positions alone. Keys outside the window are matched by content, without rotary
    embedding.

    >>> layer = BigBird(64, 4, window_size=16, n_random_tokens=4, n_global_tokens=2)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> state.k.shape  # all 100 keys
    torch.Size([2, 100, 4, 16])

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        n_random_tokens: random keys of each query.
        n_global_tokens: first tokens of the segment that every query sees.
        seed: of the random keys; give each layer of a model its own.

    Source: Zaheer et al., BigBird, arXiv 2007.14062.
    """

    state_type = KeyValueState
    label = "BigBird"
    style = ("#E69F00", "v")

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
        self.window_size = window_size
        self.n_random_tokens = n_random_tokens
        self.n_global_tokens = n_global_tokens
        self.seed = seed
        self.reset_parameters()

    @property
    def reach(self) -> int | None:
        return self.window_size

    def set_reach(self, size: int) -> None:
        self.window_size = size

    def keys_per_query(self, length: int) -> float:
        near = windowed_keys_per_query(self.window_size, self.n_global_tokens, length)
        # The first block of queries has no random keys.
        return near + self.n_random_tokens * max(0, length - RANDOM_BLOCK) / length

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
        y = self._attend_in_parts(q, k, v, segments, far)
        return self.o_proj(y.flatten(2)), cache_tail(k, v, k.shape[1], segments)

    def _attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, far: FarKeys | None
    ) -> Tensor:
        """Attention `[B, T, H, P]`; on a CPU a few tokens at a time, so that scores fit caches.

        Tensors are split once: the gradient of each of many slices would be as large as the whole.
        """
        batch, length = q.shape[:2]
        cached = k.shape[1] - length
        outside = self.window_size - 1  # keys of earlier parts that a part's queries see
        sizes = [length]
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            multiple = max(1, cover(outside, RANDOM_BLOCK)) * RANDOM_BLOCK
            sizes = split_lengths(batch, length, multiple, 0)
        key_sizes = [cached + sizes[0], *sizes[1:]]
        far_parts = [None] * len(sizes) if far is None else far.split(sizes)
        offset = 0
        ys = []
        before_k = k[:, :0]
        before_v = v[:, :0]
        for part_q, part_k, part_v, part_far in zip(
            q.split(sizes, 1), k.split(key_sizes, 1), v.split(key_sizes, 1), far_parts, strict=True
        ):
            part_segments = segments
            if segments is not None and len(sizes) > 1:
                part_segments = segments.part(offset, part_q.shape[1])
            y = self.attend(
                part_q,
                torch.cat([before_k, part_k], dim=1),
                torch.cat([before_v, part_v], dim=1),
                part_segments,
                window_size=self.window_size,
                far=part_far,
            )
            ys.append(y)
            first = max(part_k.shape[1] - outside, 0)
            before_k = part_k[:, first:]
            before_v = part_v[:, first:]
            offset += part_q.shape[1]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        random = {"window_size": 70, "n_random_tokens": 3, "n_global_tokens": 0, "seed": 7}
        return {
            "": {"window_size": 5, "n_random_tokens": 3, "n_global_tokens": 2},
            "random": random,
        }
