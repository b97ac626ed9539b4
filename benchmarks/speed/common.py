"""What all benchmarks share: shapes, one computation to time, and forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx_layers.layers import layer_options

ROOT = Path(__file__).resolve().parents[2]


class Shape(NamedTuple):
    """Width, number of heads, and window or chunk size of all layers in one run."""

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


def local_options(layer: str, size: int) -> dict[str, int]:
    """The window or chunk size, under the name that this layer of the registry has for it."""
    valid = layer_options(layer)
    return {name: size for name in ("window_size", "chunk_size") if name in valid}


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in the state of a layer or a model."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def forward(case: Case, bf16: bool = False) -> Callable[[], Any]:
    """A forward pass without gradients, optionally under autocast to bfloat16."""

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return case.call()

    return run


def forward_backward(case: Case, bf16: bool = False) -> Callable[[], Any]:
    """A forward pass, and a backward pass to all leaves."""

    def run() -> None:
        for tensor in case.leaves:
            tensor.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = case.call()
        upstream = [g.to(y.dtype) for g, y in zip(case.upstream, outputs, strict=True)]
        torch.autograd.backward(outputs, upstream)

    return run


RUNS = {"forward": forward, "forward+backward": forward_backward}
