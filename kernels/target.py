"""Chooses the row of a kernel's table of configurations for the current GPU.

The tables are in the kernels' own files, with a row for each target. They were found by compiling
candidates ahead of time (see `docs/kernels.md`); nothing is tuned at run time.
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

DEFAULT = "default"  # for GPUs without a row: made for 100 KiB of shared memory


def target() -> str:
    """`"sm_80"`, `"sm_90"` etc. for NVIDIA, `"gfx942"` for AMD, `"default"` without a GPU."""
    try:
        gpu = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU: the kernel runs in the interpreter
        return DEFAULT
    return "gfx942" if gpu.backend == "hip" else f"sm_{gpu.arch}"


def pick(table: Mapping[str, Config]) -> Config:
    """The row of the current target."""
    return table.get(target(), table[DEFAULT])


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of `tl.dot` for a dtype, by torch's setting for float32 matrix products."""
    if dtype != torch.float32 or target().startswith("gfx"):
        return "ieee"
    allowed = torch.backends.cuda.matmul
    if getattr(allowed, "fp32_precision", "none") != "none":  # torch's newer setting
        return "tf32" if allowed.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_its_device(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """Let a launcher run on the GPU of its first argument, since Triton uses the current one."""

    @wraps(launcher)
    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
        if x.device.type != "cuda":
            return launcher(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return launcher(x, *args, **kwargs)

    return launch


def processors(device: torch.device) -> int:
    """The number of programs that the device can run at the same time, at least."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
