"""BLADE: attention inside chunks, and a compact state passed from chunk to chunk."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longctx_layers.layers.attention import AttentionLayer, Projection
from longctx_layers.layers.blade_mlp import MlpUpdate
from longctx_layers.layers.description import Probe
from longctx_layers.layers.norms import HeadNorm, fuse
from longctx_layers.layers.parameters import Gate
from longctx_layers.layers.state import Field, cache_tail
from longctx_layers.layers.state_space import (
    CONV_WIDTH,
    SelectiveProjection,
    no_conv,
    two_path_probes,
    with_breaks,
)
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
        position: `[B]` int64, the position in its segment of the row's next token.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    conv: Tensor
    readable: Tensor
    pending: Tensor
    position: Tensor
    segment: Tensor


class BLADE(AttentionLayer[BLADEState]):
    """Attention for long contexts in chunks, with a recurrent memory of the chunks before.

    Tokens attend to their own chunk only, and read a state that all earlier chunks have written.
    Cost per token and state are constant in the length. Chunks count from the segment's first
    token: the token at a position is in chunk `floor((position - chunk_shift) / chunk_size)`.

    >>> layer = BLADE(64, 4, chunk_size=16)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> y, state = layer(torch.randn(2, 1, 64), state)  # the next token of each row

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        chunk_size: tokens in a chunk.
        state_dim: N, the state's dimension per channel (associative) or in all (mlp).
        state_update: `"associative"`: a selective state space, read across chunk boundaries only,
            plus the token's own convolved input; combined with the attention by a gate as in
            `DPASSM` (all chunks in parallel).
            `"mlp"`: the original definition, a vector that is added to the next chunk's input
            and updated by an MLP of the chunk's mean attention output (one chunk after another).
            None: the chunks alone.
        n_memory_tokens: learned keys and values that every token sees.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`; half a
            chunk in every second layer lets neighbouring chunks mix.

    Source: Hua et al., FLASH, arXiv 2202.10447, and Fathi et al., Block-State Transformers,
    2306.09539 (attention in chunks and a state); Dao and Gu, Mamba-2, 2405.21060.
    """

    state_type = BLADEState
    label = "BLADE"
    style = ("#009E73", "^")
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
        self.chunk_size = chunk_size
        self.chunk_shift = chunk_shift
        self._relative_shift = chunk_shift / chunk_size
        self.state_dim = state_dim
        self.state_update = state_update
        self.n_memory_tokens = n_memory_tokens
        self.state_space: SelectiveProjection | None = None
        self.mlp: MlpUpdate | None = None
        if state_update == "associative":
            self.state_space = SelectiveProjection(self, state_dim)
            self.gate_proj = Gate(d_model, self.n_heads * self.head_dim, **self.factory)
            self.norm_o = HeadNorm(self.n_heads, self.head_dim, **self.factory)
            self.norm_r = HeadNorm(self.n_heads, self.head_dim, **self.factory)
        elif state_update == "mlp":
            inner = self.n_heads * self.head_dim
            self.mlp = MlpUpdate(self.linear, d_model, inner, state_dim)
        if n_memory_tokens:
            shape = (n_memory_tokens, self.n_kv_heads, self.head_dim)
            self.memory_k = nn.Parameter(torch.empty(shape, **self.factory))
            self.memory_v = nn.Parameter(torch.empty(shape, **self.factory))
        self.reset_parameters()

    @property
    def split_multiple(self) -> int | None:
        return None if self.state_update == "mlp" else self.chunk_size  # mlp loops over chunks

    @property
    def first_split(self) -> int:
        return self.chunk_shift

    @property
    def reach(self) -> int | None:
        return self.chunk_size

    def set_reach(self, size: int) -> None:
        """Change the chunk's size between calls; its shift keeps its proportion."""
        self.chunk_size = size
        self.chunk_shift = int(self._relative_shift * size)

    @property
    def path_gate(self) -> nn.Module | None:
        return self.gate_proj if self.state_update == "associative" else None

    def probes(self) -> list[Probe]:
        return two_path_probes(self.path_gate, self.state_space)

    def keys_per_query(self, length: int) -> float:
        return (min(self.chunk_size, length) + 1) / 2 + self.n_memory_tokens

    def flops_per_token(self, length: int) -> float:
        flops = super().flops_per_token(length)
        space = self.state_space
        return flops if space is None else flops + space.flops_per_token()

    def draw_own(self) -> None:
        """Initialise the memory tokens."""
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
            return self._mix_mlp(self.mlp, x, state, segments)
        # Without segments every part of a call but the first begins a chunk: none is open.
        aligned = segments is None and offset > 0
        shift = 0 if aligned else self.chunk_shift
        q, k, v = self.project(x, None if aligned else state)
        far = self._memory(q)
        size = self.chunk_size
        o = self.attend(q, k, v, segments, far=far, chunk_size=size, chunk_shift=shift)
        kept = self._open_chunk(k, v, segments, shift)
        if self.state_space is None:
            nothing = x.new_zeros(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
            kept |= {"conv": no_conv(x), "readable": nothing, "pending": nothing}
            return self.o_proj(o.flatten(2)), kept
        conv = None if state is None else state.conv
        before = None if state is None else (state.readable, state.pending)
        inputs, kept["conv"] = self.state_space(x, conv, with_breaks(segments))
        r, (kept["readable"], kept["pending"]) = block_ssd(
            *inputs,
            chunk_size=size,
            chunk_shift=shift,
            initial_state=before,
            segments=segments,
        )
        # Tokens early in their chunk see those just before it through the convolution.
        r = self.state_space.add_skip(r, inputs.x)
        z = self.gate_proj(x).unflatten(-1, o.shape[2:])
        y = fuse(z, o, r, self.norm_o, self.norm_r)
        return self.o_proj(y.flatten(2)), kept

    def _mix_mlp(
        self, update: MlpUpdate, x: Tensor, state: BLADEState | None, segments: Segments | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if state is None:
            precise = torch.promote_types(x.dtype, torch.float32)
            readable = x.new_zeros(len(x), self.state_dim, dtype=precise)
            pending = x.new_zeros(len(x), self.n_heads * self.head_dim, dtype=precise)
        else:
            readable = state.readable
            pending = state.pending
        o, k, v, readable, pending = update(
            x,
            readable,
            pending,
            state,
            segments,
            attend=self._attend_chunk,
            chunk_size=self.chunk_size,
            chunk_shift=self.chunk_shift,
        )
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        kept = self._open_chunk(k, v, segments, self.chunk_shift)
        kept |= {"conv": no_conv(x), "readable": readable, "pending": pending}
        return self.o_proj(o.flatten(2)), kept

    def _attend_chunk(
        self, x: Tensor, state: BLADEState | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention, keys and values of one chunk of each row, all `[B, chunk_size, heads, P]`."""
        q, k, v = self.project(x, state)
        size = self.chunk_size
        o = self.attend(q, k, v, segments, window_size=size, far=self._memory(q))
        return o, k[:, -size:], v[:, -size:]

    def _memory(self, q: Tensor) -> FarKeys | None:
        """The memory keys; they are matched by content, since they have no position."""
        if not self.n_memory_tokens:
            return None
        batch, length = q.shape[:2]
        mask = torch.ones(1, 1, length, self.n_memory_tokens, dtype=torch.bool, device=q.device)
        keys, values = (
            z.to(q.dtype).transpose(0, 1)[None, :, None].expand(batch, -1, -1, -1, -1)
            for z in (self.memory_k, self.memory_v)
        )
        return FarKeys(q.transpose(1, 2), keys, values, mask, length)

    def _open_chunk(
        self, k: Tensor, v: Tensor, segments: Segments | None, shift: int
    ) -> dict[str, Tensor]:
        """Cached keys and values: those of the chunk in which the next token may continue."""
        if segments is None:
            start = torch.zeros(len(k), dtype=torch.int64, device=k.device)
            length = torch.full_like(start, k.shape[1])
            segments = Segments(start[:, None].expand(-1, k.shape[1]), length)
        start = segments.next_start()
        first = chunk_start(segments.length, start, self.chunk_size, shift)
        return cache_tail(k, v, self.chunk_size - 1, segments, torch.maximum(first, start))

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        mlp = {"state_dim": 3, "state_update": "mlp"}
        return {
            "": {"chunk_size": 5, "state_dim": 3},
            "1": {"chunk_size": 1, "state_dim": 3},
            "shift": {"chunk_size": 6, "state_dim": 3, "chunk_shift": 2},
            "memory": {"chunk_size": 5, "state_dim": 3, "n_memory_tokens": 2},
            "mlp": {"chunk_size": 5, **mlp},
            "mlp-shift": {"chunk_size": 6, **mlp, "chunk_shift": 3, "n_memory_tokens": 1},
            "none": {"chunk_size": 5, "state_update": None},
        }
