"""Calls of the kernels at a training shape: what the sweep times and the profiler looks at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.kernels import (
    attention_backward,
    attention_forward,
    ssd_backward,
    ssd_forward,
)

Run = Callable[[], tuple[Tensor, ...]]
HEAD_DIM = 64  # of the state space; attention's is what is swept


class Shape(NamedTuple):
    """Of the inputs: batch, tokens, heads, and the window of attention."""

    batch: int = 4
    length: int = 8192
    heads: int = 16
    window: int = 512


class _Inputs:
    """Random tensors, the same for every call with a seed; on "meta" none are filled."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = None
        if device != "meta":
            self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)


def calls(
    kind: str, size: int, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Run]:
    """The calls that run a kernel, by what is special about each.

    Args:
        kind: a key of `candidates.CANDIDATES`.
        size: head_dim of attention, N of the state space.
        shape: of the inputs.
        device: "cuda", "cpu" under Triton's interpreter, or "meta" to compile only.
        dtype: of the inputs.
    """
    new = _Inputs(device, dtype)
    if kind == "ssd":
        return _state_space(size, shape, new)
    return _attention(kind, size, shape, new)


def _state_space(directions: int, shape: Shape, new: _Inputs) -> dict[str, Run]:
    batch, length, heads, _ = shape
    x = new(batch, length, heads, HEAD_DIM)
    B = new(batch, length, directions)
    C = new(batch, length, directions)
    dt = new(batch, length, heads, dtype=torch.float32).abs() / 4
    state = torch.zeros(1, batch, heads, HEAD_DIM, directions, device=new.device)
    inputs = (x, dt, -dt.double(), B, C, state)
    dy = new(batch, length, heads, HEAD_DIM)
    dfinal = torch.zeros_like(state)
    return {
        "forward": lambda: ssd_forward.forward(*inputs),
        "backward": lambda: ssd_backward.backward(dy, dfinal, *inputs),
    }


def _attention(kind: str, head_dim: int, shape: Shape, new: _Inputs) -> dict[str, Run]:
    batch, length, heads, window = shape
    q, k, v, do = (new(batch, length, heads, head_dim).transpose(1, 2) for _ in range(4))
    runs: dict[str, Run] = {}
    for title, reach in ((f"window {window}", window), ("full", length)):
        index = torch.arange(length, device=new.device, dtype=torch.int32)
        first = (index - reach + 1).clamp(min=0)[None]
        inputs = (q, k, v, first, None, None, None, None, 0, head_dim**-0.5)
        if kind == "forward":
            runs[title] = partial(attention_forward.forward, *inputs)
        else:
            runs[title] = _attention_backward(inputs, do, new.device)
    return runs


def _attention_backward(inputs: tuple[Any, ...], do: Tensor, device: str) -> Run:
    q = inputs[0]
    if device == "meta":  # nothing is launched, and the forward kernel need not be compiled
        o = attention_forward.empty_by_token(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        o, lse = attention_forward.forward(*inputs)
    dlse = torch.zeros_like(lse)
    return partial(attention_backward.backward, do, dlse, o, lse, *inputs)
