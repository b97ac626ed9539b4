"""Rotary position embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from longctx_layers.ops.checks import expect_number
from longctx_layers.ops.operation import transformed

_LONGEST_CACHED = 4096  # rows: a table of a megabyte


@dataclass(frozen=True)
class RopeScaling:
    """Stretches the wavelengths of the rotary embedding, as models with extended context do.

    >>> from longctx_layers import CausalAttention, Projection
    >>> scaling = RopeScaling(factor=8.0, original_length=8192)  # Llama 3.1
    >>> layer = CausalAttention(64, 4, projection=Projection(rope_scaling=scaling))

    Attributes:
        factor: by which wavelengths are multiplied.
        original_length: tokens of the context before it was extended. None: all wavelengths take
            the factor ("linear": Chen et al., arXiv 2306.15595).
        low_freq_factor, high_freq_factor: with original_length ("llama3": Llama 3.1), wavelengths
            above `original_length / low_freq_factor` take the factor, those below
            `original_length / high_freq_factor` stay, and between the two the frequencies are
            interpolated.
    """

    factor: float
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_length", "low_freq_factor"):
            value = getattr(self, name)
            if name == "original_length" and value is None:
                continue
            expect_number(name, value)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value}; pass another")
        expect_number("high_freq_factor", self.high_freq_factor)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor = {self.low_freq_factor}, "
                f"got {self.high_freq_factor}; make it larger"
            )

    def __call__(self, frequency: Tensor) -> Tensor:
        """The scaled frequencies, in radians a token."""
        slow = frequency / self.factor
        if self.original_length is None:
            return slow
        turns = self.original_length * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        return torch.lerp(slow, frequency, ((turns - low) / (high - low)).clamp(0, 1))


def rotary_table(
    length: int, dim: int, base: float, like: Tensor, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim / 2]` of the angles of consecutive tokens.

    The angles are computed in float64 where the device has it (in float32 they are off by 0.05
    rad at a million tokens); the results are float32, or float64 for float64 inputs. On a CPU,
    where computing them takes longer than a token's other work, short tables are cached.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    precise = torch.promote_types(like.dtype, torch.float32)
    # Not while something traces or transforms the call, which would follow the table's tensors.
    # The length is last: comparing it in a traced call would limit an exported program to it.
    cache = (
        like.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(like) in (Tensor, nn.Parameter)
        and not transformed()
        and length <= _LONGEST_CACHED
    )
    compute = _cached if cache else _compute
    return compute(length, dim, base, scaling, like.device, wide, precise)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[..., T, P]`, first half against second half (the layout of Hugging Face).

    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _compute(
    length: int,
    dim: int,
    base: float,
    scaling: RopeScaling | None,
    device: torch.device,
    wide: torch.dtype,
    precise: torch.dtype,
) -> tuple[Tensor, Tensor]:
    frequency = base ** (torch.arange(0, dim, 2, device=device, dtype=wide) / -dim)
    if scaling is not None:
        frequency = scaling(frequency)
    angle = torch.arange(length, device=device, dtype=wide)[:, None] * frequency
    return angle.cos().to(precise), angle.sin().to(precise)


# Computed outside of inference mode, so that training can use a table that inference has cached.
_cached = lru_cache(maxsize=8)(torch.inference_mode(False)(_compute))
