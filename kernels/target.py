"""Which row of a kernel's table of configurations serves the GPU at hand.

The tables stand in the kernels' own files: one row per target, found once by compiling candidates
ahead of time (`docs/kernels.md` shows what came out) and never tuned at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import triton

from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)

Config = TypeVar("Config")

DEFAULT = "default"  # GPUs without a row: those with 100 KiB of shared memory, and unknown ones


def target() -> str:
    """`"sm_80"`, `"sm_90"`, `"sm_100"`, `"gfx942"`, or `"default"` for any other GPU."""
    try:
        gpu = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU: the interpreter runs the kernel
        return DEFAULT
    return gpu.arch if gpu.backend == "hip" else f"sm_{gpu.arch}"


def pick(table: Mapping[str, Config]) -> Config:
    """The current target's row."""
    return table.get(target(), table[DEFAULT])
