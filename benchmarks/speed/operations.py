"""Every operation as a layer calls it: shapes, memory layout, and cached keys in decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from benchmarks.speed.common import Case, Shape
from longctx_layers import ops
from longctx_layers.ops import FarKeys, Segments
from longctx_layers.ops.attention.far import far_cached_keys, global_mask

N_STATES = 64
N_GLOBAL = 2
N_RANDOM = 4
CONV_WIDTH = 4


class Call(NamedTuple):
    """An operation over `length` tokens that follow `cached` ones.

    Attributes:
        call: returns the output.
        leaves: the inputs that get gradients; the output has the shape of the first one.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _heads(shape: Shape, length: int) -> Tensor:
    return torch.randn(1, length, shape.n_heads, shape.d_model // shape.n_heads)


def _attention(
    shape: Shape, length: int, cached: int, *, pattern: str, n_global: int = 0, n_random: int = 0
) -> Call:
    local = shape.local
    if pattern != "full" and not n_random:
        cached = min(cached, local - 1)
    # Views, contiguous by token, as projections return them.
    q, k, v = (
        rearrange(_heads(shape, n), "b t h p -> b h t p").requires_grad_()
        for n in (length, cached + length, cached + length)
    )
    options: dict[str, Any] = {} if pattern == "full" else {f"{pattern}_size": local}
    if cached:
        start = torch.full((1, length), -cached)
        options["segments"] = Segments(start, torch.tensor([length]))

    def far() -> FarKeys | None:
        if n_random:
            return far_cached_keys(
                q,
                k,
                v,
                window_size=local,
                n_global_tokens=n_global,
                n_random_tokens=n_random,
                seed=0,
                segments=options.get("segments"),
            )
        if n_global:
            if cached:
                mask = torch.ones(1, 1, length, n_global, dtype=torch.bool)
            else:
                mask = global_mask(n_global, local, length, None, length, q.device)
            return FarKeys(q, k[:, :, None, :n_global], v[:, :, None, :n_global], mask, length)
        return None

    return Call(lambda: ops.sparse_attention(q, k, v, far=far(), **options), (q, k, v))


def _state_space(shape: Shape, length: int, cached: int, *, name: str) -> Call:
    x = _heads(shape, length).requires_grad_()
    dt = torch.rand(1, length, shape.n_heads).requires_grad_()
    A = (-torch.rand(shape.n_heads)).requires_grad_()
    B, C = _random(1, length, N_STATES), _random(1, length, N_STATES)
    state = torch.randn(1, shape.n_heads, x.shape[-1], N_STATES) if cached else None
    if name == "ssd":
        return Call(lambda: ops.ssd(x, dt, A, B, C, initial_state=state)[0], (x, dt, A, B, C))
    states = None if state is None else (state, state)  # readable, and pending

    def run() -> Tensor:
        return ops.block_ssd(x, dt, A, B, C, chunk_size=shape.local, initial_state=states)[0]

    return Call(run, (x, dt, A, B, C))


def _scan(shape: Shape, length: int, cached: int, *, varying: bool) -> Call:
    u = _random(1, length, N_STATES)
    rate = torch.rand(1, length, N_STATES) if varying else torch.rand(N_STATES)
    log_decay = (-rate).requires_grad_()
    state = torch.randn(1, N_STATES) if cached else None
    return Call(lambda: ops.diagonal_scan(u, log_decay, initial_state=state)[0], (u, log_decay))


def _conv(shape: Shape, length: int, cached: int) -> Call:
    channels = shape.d_model + 2 * N_STATES
    x, weight = _random(1, length, channels), _random(channels, CONV_WIDTH)
    before = torch.randn(1, CONV_WIDTH - 1, channels) if cached else None
    return Call(lambda: ops.conv_silu(x, weight, before=before), (x, weight))


def _norms(shape: Shape, length: int, cached: int) -> Call:
    z, o, s = (_heads(shape, length).requires_grad_() for _ in range(3))
    scales = [_random(*z.shape[2:]) for _ in range(2)]
    return Call(lambda: ops.gated_norms(z, o, s, *scales), (z, o, s, *scales))


FULL = "sparse_attention, full"
OPERATIONS: dict[str, tuple[Callable[..., Call], dict[str, Any]]] = {
    FULL: (_attention, {"pattern": "full"}),
    "sparse_attention, window": (_attention, {"pattern": "window"}),
    "sparse_attention, chunk": (_attention, {"pattern": "chunk"}),
    "sparse_attention, window + global": (
        _attention,
        {"pattern": "window", "n_global": N_GLOBAL},
    ),
    "sparse_attention, window + global + random": (
        _attention,
        {"pattern": "window", "n_global": N_GLOBAL, "n_random": N_RANDOM},
    ),
    "ssd": (_state_space, {"name": "ssd"}),
    "block_ssd": (_state_space, {"name": "block_ssd"}),
    "diagonal_scan": (_scan, {"varying": False}),
    "diagonal_scan, varying": (_scan, {"varying": True}),
    "conv_silu": (_conv, {}),
    "gated_norms": (_norms, {}),
}


def operation_case(name: str, shape: Shape, length: int, cached: int = 0) -> Case:
    """An operation over `length` tokens that follow `cached` others."""
    build, options = OPERATIONS[name]
    run, leaves = build(shape, length, cached, **options)
    return Case(lambda: (run(),), leaves, (torch.randn_like(leaves[0]),))
