"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim / 2]` of the angles of consecutive tokens.

    The angles are computed in float64 where the device has it (in float32 they are off by 0.05
    rad at a million tokens); the results are float32, or float64 for float64 inputs.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    frequency = base ** (torch.arange(0, dim, 2, device=like.device, dtype=wide) / -dim)
    angle = torch.arange(length, device=like.device, dtype=wide)[:, None] * frequency
    precise = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(precise), angle.sin().to(precise)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[..., T, P]`, first half against second half (the layout of Hugging Face).

    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
