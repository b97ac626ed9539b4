"""Grids of one dimension, and the indices of a program in them.

CUDA and HIP allow `2**31 - 1` programs along x, but only 65,535 along y and z. Since a batch may
well have more short rows than that, y and z are never used.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)

MOST_PROGRAMS = 2**31 - 1


def grid(*sizes: int) -> tuple[int]:
    """One program for each combination of indices below `sizes`; the first index varies fastest.

    Raises:
        ValueError: for more programs than a GPU allows.
    """
    programs = math.prod(sizes)
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"backend 'triton': expected a call of at most {MOST_PROGRAMS:,} programs, got "
            f"{' x '.join(map(str, sizes))} = {programs:,}; split the batch, or use "
            "backend='torch'"
        )
    return (programs,)


@triton.jit
def index_of_two(first):
    """The program's indices in `grid(first, second)`; the second one in 64 bits."""
    program = tl.program_id(0)
    return program % first, (program // first).to(tl.int64)


@triton.jit
def index_of_three(first, second):
    """The program's indices in `grid(first, second, third)`; the third one in 64 bits."""
    program = tl.program_id(0)
    rest = program // first
    return program % first, rest % second, (rest // second).to(tl.int64)
