"""What all benchmarks share: the shape of a run, cases, and the passes through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

LOCAL_OPTIONS = ("window_size", "chunk_size")


class Shape(NamedTuple):
    """Of all contenders in one run: width, heads, and the size of windows and chunks."""

    d_model: int = 768
    n_heads: int = 12
    local: int = 128


class Case(NamedTuple):
    """One computation, ready to run.

    Attributes:
        call: returns the outputs.
        leaves: the tensors whose gradients the backward pass computes.
        upstream: the gradients of the outputs.
    """

    call: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


def forward(case: Case, bf16: bool = False) -> Callable[[], Any]:
    """One pass without gradients, under autocast to bfloat16 if asked."""

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return case.call()

    return run


def forward_backward(case: Case, bf16: bool = False) -> Callable[[], Any]:
    """One pass and the gradients of all leaves."""

    def run() -> None:
        for tensor in case.leaves:
            tensor.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = case.call()
        upstream = [g.to(y.dtype) for g, y in zip(case.upstream, outputs, strict=True)]
        torch.autograd.backward(outputs, upstream)

    return run


RUNS = {"forward": forward, "forward+backward": forward_backward}
