"""How the state-space kernels are cut and launched: one row per target."""

from __future__ import annotations

from typing import NamedTuple

import torch

from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)


class Tiles(NamedTuple):
    """How the kernels cut their work, and how they are launched.

    Attributes:
        tokens: in a tile.
        span: tiles that a program walks through.
        elements: of states that a program keeps; heads with more are cut, but to 16 rows at least.
        num_warps: of a program.
        read_warps: of one whose products of tokens with tokens enter others: those are cut between
            warps by tokens alone, and of more than one for 16 the rest repeat what others do.
        shape: of AMD's matrix instructions, 0 for the compiler's choice.
    """

    tokens: int
    span: int
    elements: int
    num_warps: int
    read_warps: int
    shape: int = 0

    def launch(self, *, reads: bool = False) -> dict[str, int]:
        """Options of a launch."""
        options = {"num_warps": self.read_warps if reads else self.num_warps, "num_stages": 1}
        return {**options, "matrix_instr_nonkdim": self.shape} if self.shape else options


class Choices(NamedTuple):
    """Tiles by N for bfloat16, and for inputs of which products are float32's or wider."""

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
    Tiles(32, 16, 2048, 8, 8),  # spills some dozens of registers, and fewer warps more
    Tiles(16, 32, 2048, 4, 4),
)
_H100 = _A100._replace(upto_64=Tiles(64, 8, 2048, 8, 4))
_B200 = _A100._replace(upto_64=Tiles(64, 8, 2048, 8, 8))  # fewer warps would spill
# Instructions of 32 rows and columns, the compiler's choice, would leave most warps repeating one.
_MI300 = Choices(*[Tiles(32, 16, 2048, 4, 2, 16)] * 4)
CONFIGS = {"default": _A100, "sm_80": _A100, "sm_90": _H100, "sm_100": _B200, "gfx942": _MI300}
