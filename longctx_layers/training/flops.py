"""Operations per token of a model, and the peak of the machine to compare with.

Counted from the mathematics, so that a faster implementation has a higher utilisation: two
operations for each multiply-add of a projection, of a score and of a value; five for each element
of a selective state (decay, write, read). Norms, gates and softmaxes are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from longctx_layers import LongContextLM

BACKWARD = 2  # a backward pass costs twice its forward pass


def forward_flops(model: LongContextLM, length: int) -> float:
    """Operations per token of one forward pass, averaged over sequences of `length` tokens."""
    linears = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    head = 0 if model.head is not None else 2 * model.embedding.weight.numel()
    layers: float = sum(mixer.flops_per_token(length) for mixer in model.mixers())
    return linears + head + layers


def training_flops(model: LongContextLM, length: int) -> float:
    """Operations per token of a forward and a backward pass; recomputation does not count."""
    return (1 + BACKWARD) * forward_flops(model, length)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Operations per second of the fastest matrix product of a linear layer, measured now.

    A layer computes `x W^T`, and in the backward pass `dy W` and `dy^T x`. Libraries run these
    layouts at different speeds, so that a plain `x W` may be slower than what training reaches.
    """
    size = 8192 if device.type == "cuda" else 1024
    x, weight, dy = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    inputs = x.requires_grad_(), weight.requires_grad_()
    y = F.linear(*inputs)
    products: list[Callable[[], object]] = [
        partial(F.linear, *inputs),
        *(partial(torch.autograd.grad, y, z, dy, retain_graph=True) for z in inputs),
    ]
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        for product in products:
            begin = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
