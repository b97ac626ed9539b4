"""When the hand-written CPU paths run: eagerly, on plain tensors.

Their forward and backward work in place on buffers that stay in a core's cache, where autograd's
chain of operations fetches every intermediate from memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from longctx_layers.ops.second_order import transformed


def refuse(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the CPU paths can't run on x, or None."""
    if x.device.type != "cpu":
        return f"needs tensors on a CPU, got one on {x.device}"
    if torch.compiler.is_compiling():
        return "is not for compilers, which fuse the torch path themselves"
    if type(x) not in (Tensor, nn.Parameter, FakeTensor):  # fake ones stand for plain ones
        return f"needs plain tensors, got a {type(x).__name__}"
    if transformed():
        return "has no rules for transforms of torch.func and forward-mode gradients"
    if x.numel() == 0:
        return "needs at least one element"
    return None


def padded(x: Tensor, dim: int, front: int, back: int, dtype: torch.dtype) -> Tensor:
    """x in `dtype` with zeros before and behind it along one dimension: x itself, or a copy."""
    if not front and not back and x.dtype == dtype:
        return x
    shape = list(x.shape)
    shape[dim] += front + back
    y = x.new_empty(shape, dtype=dtype)
    y.narrow(dim, 0, front).zero_()
    y.narrow(dim, front, x.shape[dim]).copy_(x)
    y.narrow(dim, front + x.shape[dim], back).zero_()
    return y
