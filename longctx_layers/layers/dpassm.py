"""DPASSM: window attention and a state-space model, combined by a learned gate per token."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from longctx_layers.layers.attention import Projection
from longctx_layers.layers.description import Probe
from longctx_layers.layers.norms import HeadNorm, fuse
from longctx_layers.layers.parameters import Gate
from longctx_layers.layers.state import Field
from longctx_layers.layers.state_space import (
    CONV_WIDTH,
    DiagonalSSM,
    SelectiveProjection,
    no_conv,
    two_path_probes,
)
from longctx_layers.layers.window import WindowLayer
from longctx_layers.ops import Segments
from longctx_layers.ops.checks import expect_choice, expect_positive


class DPASSMState(NamedTuple):
    """What both paths remember: constant in the length.

    Attributes:
        k, v: `[B, window_size - 1, G, P]`, right-aligned, zeros where the segment has fewer.
        global_k, global_v: `[B, n_global_tokens, G, P]`, left-aligned.
        conv: `[B, 3, channels]`, the last inputs of the short convolution (no channels without).
        h: the state space, float32 at least: `[B, H, P, N]` selective, `[B, N]` diagonal, `[B, 0]`
            without one.
        position: `[B]` int64, the position in its segment of the row's next token.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    global_k: Tensor
    global_v: Tensor
    conv: Tensor
    h: Tensor
    position: Tensor
    segment: Tensor


class DPASSM(WindowLayer[DPASSMState]):
    """Attention for long contexts at constant cost per token: a window, and a recurrent memory.

    Two paths see the same input u: window attention o, and a state space s that carries what has
    left the window. A gate weighs them per channel: `y = W_o (g * RMSNorm(o) + (1 - g) *
    RMSNorm(s))`, `g = sigmoid(W_g u + b_g)`, with norms per head. At first it takes the mean of
    both. The state's size is constant in the length.

    >>> layer = DPASSM(64, 4, window_size=16)
    >>> y, state = layer(torch.randn(2, 100, 64))
    >>> y, state = layer(torch.randn(2, 1, 64), state)  # the next token of each row

    Args:
        d_model, n_heads, n_kv_heads, rope_base, dropout, projection, device, dtype: as for
            `CausalAttention`.
        window_size: keys in the window, the query's own included.
        ssm_state_dim: N, the state's dimension per channel (selective) or in all (diagonal).
        ssm: `"selective"` (Mamba-2's, input-dependent), `"diagonal"` (linear and time-invariant),
            or None for the window alone, without norm and gate.
        n_global_tokens: first tokens of the segment that every query sees, as in `Longformer`.
        fuse: `"gate"` as above, or `"residual"`: `y = W_o (o + (1 - g) * RMSNorm(s))` with the
            norm's scale 0 at first, so that the layer begins as exactly its window attention.

    Source: Dong et al., Hymba, arXiv 2411.13676 (fusion); Dao and Gu, Mamba-2, 2405.21060.
    """

    state_type = DPASSMState
    label = "DPASSM"
    style = ("#0072B2", "o")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window_size: int = 128,
        ssm_state_dim: int = 64,
        ssm: Literal["selective", "diagonal"] | None = "selective",
        n_global_tokens: int = 0,
        fuse: Literal["gate", "residual"] = "gate",
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
        expect_positive("ssm_state_dim", ssm_state_dim)
        expect_choice("ssm", ssm, ("selective", "diagonal", None))
        expect_choice("fuse", fuse, ("gate", "residual"))
        self.ssm_state_dim = ssm_state_dim
        self.ssm = ssm
        self.fuse = fuse
        self.state_space: SelectiveProjection | DiagonalSSM | None = None
        if ssm == "selective":
            self.state_space = SelectiveProjection(self, ssm_state_dim)
        elif ssm == "diagonal":
            self.state_space = DiagonalSSM(self, ssm_state_dim)
        if ssm is not None:
            self.gate_proj = Gate(d_model, self.n_heads * self.head_dim, **self.factory)
            scale = 1.0 if fuse == "gate" else 0.0
            self.norm_s = HeadNorm(self.n_heads, self.head_dim, scale, **self.factory)
            if fuse == "gate":
                self.norm_o = HeadNorm(self.n_heads, self.head_dim, **self.factory)
        self.reset_parameters()

    @property
    def path_gate(self) -> nn.Module | None:
        return None if self.ssm is None else self.gate_proj

    def probes(self) -> list[Probe]:
        return two_path_probes(self.path_gate, self.state_space)

    def flops_per_token(self, length: int) -> float:
        flops = super().flops_per_token(length)
        space = self.state_space
        return flops if space is None else flops + space.flops_per_token()

    def fields(self) -> dict[str, Field]:
        channels = 0
        shape: tuple[int, ...] = (0,)
        # Not by its class: PEFT wraps modules that are trained whole.
        if self.ssm == "selective":
            channels = cast("SelectiveProjection", self.state_space).channels
            shape = (self.n_heads, self.head_dim, self.ssm_state_dim)
        elif self.ssm == "diagonal":
            shape = (self.ssm_state_dim,)
        return {
            **super().fields(),
            "conv": Field((CONV_WIDTH - 1, channels)),
            "h": Field(shape, "accumulator"),
        }

    def options(self) -> dict[str, Any]:
        names = ("ssm_state_dim", "ssm", "fuse")
        return {**super().options(), **{name: getattr(self, name) for name in names}}

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o, kept = self.attend_window(x, state, segments, offset)
        if self.ssm is None:
            kept["conv"] = no_conv(x)
            kept["h"] = x.new_zeros(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
            return self.o_proj(o.flatten(2)), kept
        conv = None if state is None else state.conv
        h = None if state is None else state.h
        # PEFT wraps modules that it trains whole: the path is known by its methods, not its class.
        path = cast("SelectiveProjection | DiagonalSSM", self.state_space)
        s, kept["conv"], kept["h"] = path.run(x, conv, h, segments)
        if self.ssm == "diagonal":
            s = self.heads(s, self.n_heads)
        z = self.gate_proj(x).unflatten(-1, o.shape[2:])
        if self.fuse == "gate":
            y = fuse(z, o, s, self.norm_o, self.norm_s)
        else:
            y = o + (1 - torch.sigmoid(z)) * self.norm_s(s)
        return self.o_proj(y.flatten(2)), kept

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        return {
            "": {"window_size": 5, "ssm_state_dim": 3},
            "diagonal": {"window_size": 5, "ssm_state_dim": 3, "ssm": "diagonal"},
            "none": {"window_size": 4, "ssm": None},
            "global": {"window_size": 4, "ssm_state_dim": 3, "n_global_tokens": 2},
            "residual": {"window_size": 6, "ssm_state_dim": 3, "fuse": "residual"},
        }
