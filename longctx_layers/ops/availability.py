"""When Triton's kernels can run on a GPU: answered without importing Triton, also while tracing.

What holds for all hand-written backends (devices, compilers, derivatives) is in `operation`.
"""

from __future__ import annotations

import os
import re
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

OLDEST = 8  # compute capability: on older GPUs, registers spill by the thousands
MINIMUM = (3, 6)
# NVIDIA architectures on which only later versions are right, by major compute capability.
# Gradients on Hopper: https://github.com/fla-org/flash-linear-attention/issues/640 and 984.
MINIMUM_ON = {9: (3, 7, 1)}
OVERRIDE = "LONGCTX_TRITON_ANY"
# AMD's architectures with matrix instructions for 64 lanes (MI200 and later). On gfx11 (RDNA),
# attention and state spaces spill hundreds of registers.
AMD = ("gfx90a", "gfx94", "gfx95")

INSTALLED = util.find_spec("triton") is not None
VERSION = tuple(map(int, re.findall(r"\d+", metadata.version("triton"))[:3])) if INSTALLED else ()


def _is_on(value: str | None) -> bool:
    """Whether the override's value turns it on.

    Raises:
        ValueError: if the value is neither 1 nor 0.
    """
    if value not in (None, "", "0", "1"):
        raise ValueError(
            f"{OVERRIDE}: expected 1 (run the kernels on any Triton) or 0, got {value!r}; set one "
            "of them, or unset the variable"
        )
    return value == "1"


# Read once, at import: refusals are decided while torch.compile traces, which can guard on a plain
# global, but not on the environment.
ANY_VERSION = _is_on(os.environ.get(OVERRIDE))


def refuse_triton(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why Triton's kernels can't run a call whose first argument is x, on a GPU, or None."""
    return refuse_device(x.device, x.dtype)


def refuse_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels can't run on a GPU in a dtype, or None."""
    if not INSTALLED:
        return "needs Triton: pip install 'longctx-layers[triton]'"
    if dtype == torch.float64:
        return "computes in float32: float64 runs on the torch path"
    # Unlike get_device_capability, torch.compile takes the properties for a constant.
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return refuse_version(VERSION, properties.major)
    return refuse_architecture(properties.gcnArchName) or refuse_version(VERSION, None)


def refuse_architecture(name: str) -> str | None:
    """Why an AMD architecture, such as `"gfx942:sramecc+:xnack-"`, is not used, or None."""
    if name.startswith(AMD):
        return None
    return f"needs one of {', '.join(AMD)} among AMD GPUs, got {name}, where registers spill"


def refuse_version(version: tuple[int, ...], capability: int | None) -> str | None:
    """Why this Triton is not used on GPUs of a major compute capability (None: AMD), or None.

    `LONGCTX_TRITON_ANY=1` accepts every version; a GPU that is too old is refused all the same.
    """
    if capability is not None and capability < OLDEST:
        return f"needs compute capability {OLDEST} or higher, got {capability}"
    needed = MINIMUM if capability is None else MINIMUM_ON.get(capability, MINIMUM)
    if version >= needed or ANY_VERSION:
        return None
    installed, wanted = (".".join(map(str, numbers)) for numbers in (version, needed))
    return (
        f"needs Triton {wanted} on this GPU, got {installed}; upgrade torch, which brings its own, "
        f"or set {OVERRIDE}=1 and let longctx_layers.selfcheck() tell whether this version is right"
    )
