"""Which row of a kernel's table of configurations serves the GPU at hand.

The tables stand in the kernels' own files: one row per target, found once by compiling candidates
ahead of time (`docs/kernels.md` shows what came out) and never tuned at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
import triton

from longctx_layers.kernels.guard import check_import_name

check_import_name(__name__)

Config = TypeVar("Config")
Result = TypeVar("Result")

DEFAULT = "default"  # GPUs without a row: those with 100 KiB of shared memory, and unknown ones


def target() -> str:
    """`"sm_80"`, `"sm_90"`, `"sm_100"`, `"gfx942"` for those of AMD, `"default"` for any other."""
    try:
        gpu = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU: the interpreter runs the kernel
        return DEFAULT
    return "gfx942" if gpu.backend == "hip" else f"sm_{gpu.arch}"


def pick(table: Mapping[str, Config]) -> Config:
    """The current target's row."""
    return table.get(target(), table[DEFAULT])


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as exactly as torch is asked to."""
    if dtype != torch.float32 or target().startswith("gfx"):
        return "ieee"
    allowed = torch.backends.cuda.matmul
    if getattr(allowed, "fp32_precision", "none") != "none":  # torch's newer setting
        return "tf32" if allowed.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_its_device(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """The launcher, on the GPU of its first argument: Triton itself takes the current one."""

    @wraps(launcher)
    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
        if x.device.type != "cuda":
            return launcher(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return launcher(x, *args, **kwargs)

    return launch


def processors(device: torch.device) -> int:
    """How many programs the device runs side by side at least."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
