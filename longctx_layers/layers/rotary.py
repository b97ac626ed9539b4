"""Rotary position embedding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from longctx_layers.ops import cpu_support

_LONGEST_KEPT = 4096  # rows: a table of a megabyte


def rotary_table(length: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim / 2]` of the angles of consecutive tokens.

    The angles are computed in float64 where the device has it (in float32 they are off by 0.05
    rad at a million tokens); the results are float32, or float64 for float64 inputs. On a CPU,
    where computing them takes longer than a token's other work, short tables are kept.
    """
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    precise = torch.promote_types(like.dtype, torch.float32)
    plain = type(like) in (Tensor, nn.Parameter) and cpu_support.refuse(like) is None
    compute = _kept if plain and length <= _LONGEST_KEPT else _compute
    return compute(length, dim, base, like.device, wide, precise)


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
    device: torch.device,
    wide: torch.dtype,
    precise: torch.dtype,
) -> tuple[Tensor, Tensor]:
    frequency = base ** (torch.arange(0, dim, 2, device=device, dtype=wide) / -dim)
    angle = torch.arange(length, device=device, dtype=wide)[:, None] * frequency
    return angle.cos().to(precise), angle.sin().to(precise)


# Outside of inference mode, or training could not use what inference has kept.
_kept = lru_cache(maxsize=8)(torch.inference_mode(False)(_compute))
