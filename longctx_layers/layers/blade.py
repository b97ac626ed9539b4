"""BLADE: attention inside blocks, and a compact state handed from block to block."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longctx_layers.layers.base import AttentionLayer, HeadNorm, Projection
from longctx_layers.layers.blade_mlp import MlpUpdate
from longctx_layers.layers.fusion import fuse
from longctx_layers.layers.parameters import Gate
from longctx_layers.layers.ssm import (
    CONV_WIDTH,
    SelectiveProjection,
    no_conv,
)
from longctx_layers.layers.state import Field
from longctx_layers.ops import FarKeys, Segments, block_ssd
from longctx_layers.ops.checks import expect_choice, expect_count, expect_positive
from longctx_layers.ops.segments import chunk_start


class BLADEState(NamedTuple):
    """The open chunk and the state from the chunks before it: constant in the length.

    Attributes:
        k, v: `[B, chunk_size - 1, G, P]`, of the open chunk, right-aligned, zeros before them.
        conv: `[B, 3, channels]`, the last inputs of the short convolution (no channels without).
        readable: float32 at least: what tokens read. Associative: `[B, H, P, N]`, decayed to now;
            mlp: the state vector `[B, N]`; without an update `[B, 0]`.
        pending: float32 at least: what the open chunk has written so far, readable from the next
            chunk on. Associative: `[B, H, P, N]`; mlp: the sum of its attention outputs
            `[B, H * P]`; without an update `[B, 0]`.
        position: `[B]` int64, where in its segment the row's next token will stand.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    conv: Tensor
    readable: Tensor
    pending: Tensor
    position: Tensor
    segment: Tensor


class BLADE(AttentionLayer):
    """Block-local attention with a state read by every token of the following blocks.

    `y, state = layer(x, state=None, *, segment_ids=None)`, x and y `[B, T, d_model]`. The state's
    size is constant in T. Chunks count from the segment's first token:
    `floor((position - chunk_shift) / chunk_size)`.

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        chunk_size: tokens in a chunk.
        state_dim: N, the state's dimension per channel (associative) or in all (mlp).
        state_update: `"associative"`: a selective state space read across chunk boundaries only,
            beside the token's own convolved input, fused with the attention by a gate as in
            `DPASSM` (all chunks in parallel).
            `"mlp"`: the original definition, a vector that is injected into the next chunk's input
            and renewed by an MLP of the chunk's mean attention output (chunks one after another).
            None: the chunks alone.
        n_memory_tokens: learned keys and values that every token sees.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`; half a
            chunk in every second layer lets neighbouring chunks mix.

    Source: Hua et al., FLASH, arXiv 2202.10447, and Fathi et al., Block-State Transformers,
    2306.09539 (attention in chunks beside a state); Dao and Gu, Mamba-2, 2405.21060.
    """

    state_type = BLADEState
    no_decay = ("memory_k", "memory_v")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        chunk_size: int = 128,
        state_dim: int = 64,
        state_update: Literal["associative", "mlp"] | None = "associative",
        n_memory_tokens: int = 0,
        chunk_shift: int = 0,
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
        expect_positive("chunk_size", chunk_size)
        expect_positive("state_dim", state_dim)
        expect_choice("state_update", state_update, ("associative", "mlp", None))
        expect_count("n_memory_tokens", n_memory_tokens)
        expect_count("chunk_shift", chunk_shift)
        if chunk_shift >= chunk_size:
            raise ValueError(
                f"chunk_shift: expected less than chunk_size = {chunk_size}, got {chunk_shift}; "
                "take the remainder"
            )
        self.chunk_size, self.chunk_shift, self.state_dim = chunk_size, chunk_shift, state_dim
        self.state_update, self.n_memory_tokens = state_update, n_memory_tokens
        if state_update != "mlp":  # which has a loop of its own
            self.grain, self.first_piece = chunk_size, chunk_shift
        self.state_space: SelectiveProjection | None = None
        self.mlp: MlpUpdate | None = None
        if state_update == "associative":
            self.state_space = SelectiveProjection(self, state_dim)
            self.gate_proj = Gate(d_model, self.n_heads * self.head_dim, **self.factory)
            self.norm_o = HeadNorm(self.n_heads, self.head_dim, **self.factory)
            self.norm_r = HeadNorm(self.n_heads, self.head_dim, **self.factory)
        elif state_update == "mlp":
            self.mlp = MlpUpdate(self, state_dim)
        if n_memory_tokens:
            shape = (n_memory_tokens, self.n_kv_heads, self.head_dim)
            self.memory_k = nn.Parameter(torch.empty(shape, **self.factory))
            self.memory_v = nn.Parameter(torch.empty(shape, **self.factory))
        self.reset_parameters()

    def draw_own(self) -> None:
        """Draw the memory tokens."""
        if self.n_memory_tokens:
            nn.init.normal_(self.memory_k)
            nn.init.zeros_(self.memory_v)

    def fields(self) -> dict[str, Field]:
        channels = 0
        readable: tuple[int, ...] = (0,)
        pending: tuple[int, ...] = (0,)
        if self.state_space is not None:
            channels = self.state_space.channels
            readable = pending = (self.n_heads, self.head_dim, self.state_dim)
        elif self.mlp is not None:
            readable, pending = (self.state_dim,), (self.n_heads * self.head_dim,)
        return {
            **self.cache_fields(self.chunk_size - 1),
            "conv": Field((CONV_WIDTH - 1, channels)),
            "readable": Field(readable, "accumulator"),
            "pending": Field(pending, "accumulator"),
        }

    def options(self) -> dict[str, Any]:
        names = ("chunk_size", "state_dim", "state_update", "n_memory_tokens", "chunk_shift")
        return {name: getattr(self, name) for name in names}

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.mlp is not None:
            o, k, v, readable, pending = self.mlp(self, x, state, segments)
            kept = {"readable": readable, "pending": pending}
            kept |= self.open_chunk(k, v, segments, self.chunk_shift)
            return o.flatten(2), {**kept, "conv": no_conv(x)}
        # Without segments a piece behind the first begins a chunk: none is open.
        aligned = segments is None and offset > 0
        shift = 0 if aligned else self.chunk_shift
        o, k, v = self.attend(
            x,
            None if aligned else state,
            segments,
            chunk_size=self.chunk_size,
            chunk_shift=shift,
            far=self.memory(x),
        )
        kept = self.open_chunk(k, v, segments, shift)
        if self.state_space is None:
            none = x.new_zeros(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
            return o.flatten(2), {**kept, "conv": no_conv(x), "readable": none, "pending": none}
        *inputs, conv = self.state_space(x, None if state is None else state.conv, segments)
        r, (readable, pending) = block_ssd(
            *inputs,
            chunk_size=self.chunk_size,
            chunk_shift=shift,
            initial_state=None if state is None else (state.readable, state.pending),
            segments=segments,
        )
        # What a token early in its chunk has of those before it: the convolution's taps.
        r = self.state_space.add_skip(r, inputs[0])
        z = self.heads(self.gate_proj(x), self.n_heads)
        y = fuse(z, o, r, self.norm_o, self.norm_r)
        kept |= {"conv": conv, "readable": readable, "pending": pending}
        return y.flatten(2), kept

    def memory(self, x: Tensor) -> Any:
        """The memory keys as far keys, or None; matched by content, as they have no position."""
        if not self.n_memory_tokens:
            return None
        mask = torch.ones(1, 1, x.shape[1], self.n_memory_tokens, dtype=torch.bool, device=x.device)

        def far(q: Tensor, k: Tensor, v: Tensor) -> FarKeys:
            keys, values = (
                z.to(q.dtype).transpose(0, 1)[None, :, None].expand(len(q), -1, -1, -1, -1)
                for z in (self.memory_k, self.memory_v)
            )
            return FarKeys(q, keys, values, mask, x.shape[1])

        return far

    def open_chunk(
        self, k: Tensor, v: Tensor, segments: Segments | None, shift: int
    ) -> dict[str, Tensor]:
        """Keys and values of the chunk that the next token will find open."""
        if segments is None:
            start = torch.zeros(len(k), dtype=torch.int64, device=k.device)
            length = torch.full_like(start, k.shape[1])
            segments = Segments(start[:, None].expand(-1, k.shape[1]), length)
        start = segments.next_start()
        first = chunk_start(segments.length, start, self.chunk_size, shift)
        return self.cache(k, v, self.chunk_size - 1, segments, torch.maximum(first, start))
