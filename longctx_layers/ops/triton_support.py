"""When Triton's kernels can run a call: asked without importing Triton, and while tracing."""

from __future__ import annotations

import os
import re
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from longctx_layers.ops.second_order import NO_FORWARD_MODE, forward_mode

OLDEST = 8  # compute capability: before, registers spill by the thousands
MINIMUM = (3, 6)
# NVIDIA architectures on which later versions only are right, by major compute capability.
# Gradients on Hopper: https://github.com/fla-org/flash-linear-attention/issues/640 and 984.
MINIMUM_ON = {9: (3, 7, 1)}
OVERRIDE = "LONGCTX_TRITON_ANY"
# Of AMD's architectures those with matrix instructions for 64 lanes (MI200 and later): on gfx11
# (RDNA) attention and state spaces spill hundreds of registers.
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


def refuse(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why Triton's kernels can't run an operation's call, whose first argument is x, or None."""
    if x.numel() == 0:
        return f"takes no empty tensors, got one of shape {list(x.shape)}"
    if not torch.compiler.is_compiling() and forward_mode():
        return NO_FORWARD_MODE
    return refuse_device(x.device, x.dtype)


def refuse_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels can't run on a device in a dtype, or None."""
    if device.type != "cuda":
        return f"needs a GPU of NVIDIA or AMD, got a tensor on {device.type!r}"
    if not INSTALLED:
        return "Triton is not installed: pip install 'longctx-layers[triton]'"
    if dtype == torch.float64:
        return "computes in float32: float64 runs on the torch path"
    # Unlike get_device_capability, torch.compile takes the properties for a constant.
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return refuse_version(VERSION, properties.major)
    return refuse_architecture(properties.gcnArchName) or refuse_version(VERSION, None)


def refuse_architecture(name: str) -> str | None:
    """Why an architecture of AMD, such as `"gfx942:sramecc+:xnack-"`, is not used, or None."""
    if name.startswith(AMD):
        return None
    return f"needs one of {', '.join(AMD)} among AMD's GPUs, got {name}, where registers spill"


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
