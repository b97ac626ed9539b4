"""Launches on the meta device, with the shapes of real models: what is compiled ahead of time.

Each function calls an operation's launchers, forward and backward; inside
`ahead.compiled_for(target)` that compiles every kernel they start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx_layers.kernels import (
    attention_backward,
    attention_forward,
    conv_silu,
    diagonal,
    gated_norms,
)

BATCH, LENGTH, HEADS = 2, 4096, 12


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sparse_attention(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = HEADS,
    far: bool = False,
    length: int = LENGTH,
) -> None:
    """All patterns are one kernel; far keys add a loop. A length of 1 decodes."""
    q = empty(BATCH, length, HEADS, head_dim, dtype=dtype).transpose(1, 2)
    k = empty(BATCH, LENGTH, groups, head_dim, dtype=dtype).transpose(1, 2)
    distant: tuple[Tensor | None, ...] = (None, None, None, None)
    if far:
        lists = empty(BATCH, groups, LENGTH // 64, 6, head_dim, dtype=dtype)
        distant = (q, lists, lists, empty(BATCH, 1, length, 6, dtype=torch.bool))
    call = q, k, k, empty(1, length, dtype=torch.int32), *distant, 64, 0.125
    o, lse = attention_forward.forward(*call)
    if length > 1:
        attention_backward.backward(o, lse, o, lse, *call)


def diagonal_scan(invariant: bool, packed: bool) -> None:
    """The state of a diagonal layer."""
    u = empty(BATCH, LENGTH, 64)
    decay = empty(64, dtype=torch.float32)
    if not invariant:
        decay = empty(BATCH, LENGTH, 64, dtype=torch.float32)
    state = empty(BATCH, 64, dtype=torch.float32)
    start = empty(BATCH, LENGTH, dtype=torch.int64) if packed else None
    length = empty(BATCH, dtype=torch.int64) if packed else None
    h, final = diagonal.forward(u, decay, state, start, length)
    diagonal.backward(h, final, h, decay, state, start, length)


def norms(head_dim: int) -> None:
    """The gate with both path norms."""
    paths = [empty(BATCH, LENGTH, HEADS, head_dim) for _ in range(3)]
    weights = [empty(HEADS, head_dim, dtype=torch.float32) for _ in range(2)]
    y = gated_norms.forward(*paths, *weights, 1e-5)
    gated_norms.backward(y, *paths, *weights, 1e-5)


def convolution(packed: bool) -> None:
    """The short convolution of a selective state space."""
    x, weight = empty(BATCH, LENGTH, 896), empty(896, 4, dtype=torch.float32)
    start = empty(BATCH, LENGTH, dtype=torch.int64) if packed else None
    before = empty(BATCH, 3, 896)
    y = conv_silu.forward(x, weight, before, start)
    conv_silu.backward(y, x, weight, before, start)
