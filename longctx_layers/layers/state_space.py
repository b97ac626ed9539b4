"""State-space paths of layers: the inputs of the selective one, and the diagonal one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.layers.attention import AttentionLayer
from longctx_layers.layers.description import Probe
from longctx_layers.layers.init import already_drawn, set_first
from longctx_layers.layers.parameters import SpecialParameters
from longctx_layers.layers.state import tail
from longctx_layers.ops import Segments, conv_silu, diagonal_scan, ssd

CONV_WIDTH = 4


class SSDInputs(NamedTuple):
    """The arguments of `ssd` and `block_ssd`, in their order."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class SelectiveProjection(SpecialParameters):
    """`x, B, C = SiLU(conv4(W u))` and `dt = softplus(W_dt u + b_dt)`, as in Mamba-2.

    The initial time scales are spread log-uniformly over the heads, from 16 to 16384 tokens.

    Source: Dao and Gu, Mamba-2, arXiv 2405.21060.
    """

    no_decay = ("A_log", "dt_bias", "skip")
    # Logarithms of rates, up to 8 in size: bfloat16 would round the time scales by up to 3 %, and
    # swallow the steps of an optimizer.
    full_precision = _keep_in_fp32_modules_strict = ("A_log", "dt_bias")

    def __init__(self, layer: AttentionLayer[Any], state_dim: int) -> None:
        super().__init__()
        self.n_heads = layer.n_heads
        self.head_dim = layer.head_dim
        self.state_dim = state_dim
        self.in_proj = layer.linear(layer.d_model, self.channels)
        self.dt_proj = layer.linear(layer.d_model, layer.n_heads)
        self.conv = nn.Parameter(torch.empty(self.channels, CONV_WIDTH, **layer.factory))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads, **layer.factory))
        self.A_log = nn.Parameter(torch.empty(self.n_heads, **layer.factory))
        self.skip = nn.Parameter(torch.empty(self.n_heads, **layer.factory))

    @torch.no_grad()
    def draw_own(self) -> None:
        """Initialise the convolution and the steps randomly, and set time scales and skip."""
        bound = CONV_WIDTH**-0.5
        nn.init.uniform_(self.conv, -bound, bound)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32)
        dt = dt.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        scale = torch.logspace(math.log10(16), math.log10(16384), self.n_heads, device=dt.device)
        # softplus inverted; and 1 / (exp(A_log) dt) = scale.
        set_first(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        if already_drawn(self.dt_bias):
            dt = F.softplus(self.dt_bias.float())  # loaded: the time scales must fit it
        set_first(self.A_log, -torch.log(scale * dt))
        nn.init.ones_(self.skip)

    @property
    def channels(self) -> int:
        """Channels of the short convolution."""
        return self.n_heads * self.head_dim + 2 * self.state_dim

    def forward(
        self, u: Tensor, before: Tensor | None, segments: Segments | None
    ) -> tuple[SSDInputs, Tensor]:
        """Project and convolve.

        Args:
            u: the layer's input `[B, T, D]`.
            before: the state's `conv`, or None at the beginning.
            segments: of u, from `with_breaks`.

        Returns:
            The inputs of the recurrence, and the new state's `conv`.
        """
        z = self.in_proj(u)
        if before is None:
            before = z.new_zeros(len(z), CONV_WIDTH - 1, self.channels)
        before = before.to(z.dtype)
        # Rows without padding end together: no need to copy all of z for its end.
        recent = z[:, 1 - CONV_WIDTH :] if segments is None else z
        conv = tail(torch.cat([before, recent], dim=1), CONV_WIDTH - 1, segments)
        z = conv_silu(z, self.conv, before=before, segments=segments)
        inner = self.n_heads * self.head_dim
        x, B, C = z.split([inner, self.state_dim, self.state_dim], dim=-1)
        precise = torch.promote_types(u.dtype, torch.float32)
        dt = F.softplus(self.dt_proj(u).to(precise) + self.dt_bias.to(precise))
        A = -torch.exp(self.A_log.to(precise))
        return SSDInputs(x.unflatten(-1, (self.n_heads, self.head_dim)), dt, A, B, C), conv

    def run(
        self, u: Tensor, conv: Tensor | None, h: Tensor | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole path.

        Args:
            u: the layer's input `[B, T, D]`.
            conv, h: of the state, or None at the beginning.
            segments: of u.

        Returns:
            s `[B, T, H, P]`, and the new state's conv and h.
        """
        segments = with_breaks(segments)
        inputs, conv = self(u, conv, segments)
        s, h = ssd(*inputs, initial_state=h, segments=segments)
        return self.add_skip(s, inputs.x), conv, h

    def add_skip(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the token's own convolved input to what was read from the state: `[B, T, H, P]`."""
        return torch.addcmul(y, x, self.skip[:, None].to(y.dtype))

    def flops_per_token(self) -> float:
        """Operations per token besides the projections: 5 per element of the state (decay, write,
        read), and the convolution."""
        inner = self.n_heads * self.head_dim
        return 5 * inner * self.state_dim + 2 * CONV_WIDTH * self.channels

    def probe(self) -> Probe:
        """Statistics of the time scales."""
        return Probe(self.dt_proj, self._time_scales)

    def _time_scales(self, z: Tensor) -> dict[str, Tensor]:
        dt = F.softplus(z.float() + self.dt_bias.float()).flatten(0, -2).mean(0)
        return time_scales(-(self.A_log.float() + dt.log()))


class DiagonalSSM(SpecialParameters):
    """`h_t = alpha h_{t-1} + W_B u_t`, `s_t = W_C h_t`, alpha a learned constant in (0, 1)^N.

    Initial time scales are spread log-uniformly, from 1 to 4096 tokens.
    """

    no_decay = full_precision = _keep_in_fp32_modules_strict = ("log_rate",)

    def __init__(self, layer: AttentionLayer[Any], state_dim: int) -> None:
        super().__init__()
        self.B_proj = layer.linear(layer.d_model, state_dim)
        self.C_proj = layer.linear(state_dim, layer.n_heads * layer.head_dim)
        self.log_rate = nn.Parameter(torch.empty(state_dim, **layer.factory))

    @torch.no_grad()
    def draw_own(self) -> None:
        """Set the time scales; the layer initialises the projections."""
        rate = self.log_rate
        scale = torch.logspace(0, math.log10(4096), len(rate), device=rate.device)
        set_first(rate, -torch.log(scale))  # alpha = exp(-exp(log_rate)) = exp(-1 / scale)

    def forward(
        self, u: Tensor, initial: Tensor | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` and h `[B, N]` to s `[B, T, H * P]` and the final h."""
        segments = with_breaks(segments)
        precise = torch.promote_types(u.dtype, torch.float32)
        log_decay = -torch.exp(self.log_rate.to(precise))
        h, final = diagonal_scan(
            self.B_proj(u), log_decay, initial_state=initial, segments=segments
        )
        s: Tensor = self.C_proj(h)
        return s, final

    def run(
        self, u: Tensor, conv: Tensor | None, h: Tensor | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SelectiveProjection.run`, but s is `[B, T, H * P]`, and conv empty."""
        s, h = self(u, h, segments)
        return s, no_conv(s), h

    def flops_per_token(self) -> float:
        """Operations per token besides the projections."""
        return 3 * len(self.log_rate)

    def probe(self) -> Probe:
        """Statistics of the time scales."""
        return Probe(self.B_proj, self._time_scales)

    def _time_scales(self, _: Tensor) -> dict[str, Tensor]:
        return time_scales(-self.log_rate.float())


def with_breaks(segments: Segments | None) -> Segments | None:
    """None if every row is one unbroken segment without padding: scans then skip all resets."""
    return segments if segments is not None and segments.packed else None


def no_conv(x: Tensor) -> Tensor:
    """The empty conv tail of a layer without one: `[B, 3, 0]`."""
    return x.new_zeros(len(x), CONV_WIDTH - 1, 0)


def time_scales(log_scale: Tensor) -> dict[str, Tensor]:
    """After how many tokens a state has decayed to 1 / e: the geometric mean, and the longest."""
    return {
        "time_scale": log_scale.mean().exp(),
        "longest_time_scale": log_scale.max().exp(),
    }


def two_path_probes(gate: nn.Module | None, space: nn.Module | None) -> list[Probe]:
    """Statistics of a layer that weighs attention against a state space by a gate."""
    probes = []
    if gate is not None:
        probes.append(Probe(gate, lambda z: {"gate": torch.sigmoid(z.float()).mean()}))
    if space is not None:
        probes.append(cast("SelectiveProjection | DiagonalSSM", space).probe())
    return probes
