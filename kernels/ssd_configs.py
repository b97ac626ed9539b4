"""Tile sizes and launch options of the state-space kernels, for each target."""

from __future__ import annotations

from typing import NamedTuple

import torch

from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)


class Tiles(NamedTuple):
    """How the work is divided between programs, and how they are launched.

    Attributes:
        tokens: tokens in a tile.
        span: tiles that a program processes one by one.
        elements: elements of the state that a program keeps. The state of a head with more is
            divided between programs, by rows, of which each has at least 16.
        num_warps: warps of a program.
        read_warps: warps of a program whose products of tokens with tokens are inputs of other
            products. Those are divided between warps by tokens only: warps beyond one for every 16
            tokens repeat the work of others.
        shape: size of AMD's matrix instructions; 0 for the compiler's choice.
    """

    tokens: int
    span: int
    elements: int
    num_warps: int
    read_warps: int
    shape: int = 0

    def launch(self, *, reads: bool = False) -> dict[str, int]:
        """Options of a launch; `reads` is for kernels that `read_warps` is about."""
        options = {"num_warps": self.read_warps if reads else self.num_warps, "num_stages": 1}
        return {**options, "matrix_instr_nonkdim": self.shape} if self.shape else options


class Choices(NamedTuple):
    """Tiles by N for bfloat16, and those for other inputs, whose products are at least float32."""

    upto_64: Tiles
    upto_128: Tiles
    upto_256: Tiles
    wide: Tiles

    def of(self, dtype: torch.dtype, directions: int) -> Tiles:
        """The tiles for a dtype and N."""
        if dtype != torch.bfloat16:
            return self.wide
        if directions <= 64:
            return self.upto_64
        return self.upto_128 if directions <= 128 else self.upto_256


_A100 = Choices(
    Tiles(32, 16, 2048, 4, 2),
    Tiles(32, 16, 2048, 8, 4),
    Tiles(32, 16, 2048, 8, 8),  # spills some registers; fewer warps would spill more
    Tiles(16, 32, 2048, 4, 4),
)
_H100 = _A100._replace(upto_64=Tiles(64, 8, 2048, 8, 4))
_B200 = _A100._replace(upto_64=Tiles(64, 8, 2048, 8, 8))  # fewer warps would spill registers
# With the compiler's choice, instructions of 32 x 32, most warps would repeat the work of another.
_MI300 = Choices(*[Tiles(32, 16, 2048, 4, 2, 16)] * 4)
CONFIGS = {"default": _A100, "sm_80": _A100, "sm_90": _H100, "sm_100": _B200, "gfx942": _MI300}
