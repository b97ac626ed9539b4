"""When flash-attn can run a call, and which of its versions: asked without importing it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from longctx_layers.ops.second_order import NO_FORWARD_MODE, forward_mode


def _version(distribution: str) -> TorchVersion | None:
    try:
        return TorchVersion(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


# Of the distributions: both of them install into one package, flash_attn.
VERSIONS = {4: _version("flash-attn-4"), 2: _version("flash-attn")}
# The first that we know how to differentiate with far keys: version 2 by its backward's arguments,
# version 4 by gradients of the log-sum-exp.
MINIMUM = {4: "4.0.0b11", 2: "2.7"}


def refuse(q: Tensor, *_: Tensor, dropout_p: float, **__: Any) -> str | None:
    """Why flash-attn can't run a call of `sparse_attention`, or None."""
    if torch.compiler.is_compiling():
        return "is not traced by torch.compile or torch.export"
    if q.numel() == 0:
        return f"takes no empty tensors, got q of shape {list(q.shape)}"
    if forward_mode():
        return NO_FORWARD_MODE
    return choose(q, dropout_p)[1]


def choose(q: Tensor, dropout_p: float) -> tuple[int, str | None]:
    """The version of flash-attn that runs a call, 4 or 2; else 0, and why there is none."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return 0, f"needs a GPU of NVIDIA, got a tensor on {q.device.type!r}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return 0, f"takes float16 or bfloat16, got {q.dtype}"
    return choose_on(torch.cuda.get_device_properties(q.device).major, q.shape[-1], dropout_p)


def choose_on(major: int, head_dim: int, dropout_p: float) -> tuple[int, str | None]:
    """The same for a GPU of this major compute capability."""
    reasons = []
    for number, version in VERSIONS.items():
        if version is None:
            continue
        limit = 128 if number == 4 else 192 if dropout_p > 0 else 256
        if version < MINIMUM[number]:
            reason = f"is older than {MINIMUM[number]}: upgrade it"
        elif major not in (9, 10, 11) if number == 4 else major < 8:
            # Version 4 has no backward before Hopper, and its one for 12 is little tried.
            reason = f"is not used on compute capability {major}"
        elif number == 4 and dropout_p > 0:
            reason = f"drops no attention weights, got dropout_p = {dropout_p}"
        elif head_dim > limit:
            # Version 4 takes some longer ones, but not the same on every GPU.
            reason = f"is used up to head_dim {limit} for this call, got {head_dim}"
        else:
            return number, None
        reasons.append(f"flash-attn {version} {reason}")
    missing = "flash-attn is not installed: pip install 'longctx-layers[flash]' or '[flash4]'"
    return 0, "; ".join(reasons) or missing
