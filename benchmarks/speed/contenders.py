"""Every contender by its name: layers, their linear floors, peers, operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.common import LOCAL_OPTIONS, Case, Shape
from benchmarks.speed.operations import OPERATIONS, operation_case
from benchmarks.speed.peers import PEERS
from longctx_layers import build_layer
from longctx_layers.layers import Layer, layer_options

FLOOR = "linears of "
COMPILED = ", compiled"


class LinearFloor(nn.Module):
    """The linear projections of a layer and nothing else, which the layer can't be faster than.

    They are the layer's own modules, each applied to as many tokens as in the layer. What the
    query's projection has made goes through the output's, where the layer has both.
    """

    def __init__(self, layer: Layer[Any]) -> None:
        super().__init__()
        self.layer = layer
        self.linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        self.chained = {"q_proj", "o_proj"} <= set(self.linears)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = [self.layer.o_proj(self.layer.q_proj(x))] if self.chained else []
        for name, module in self.linears.items():
            if self.chained and name in ("q_proj", "o_proj"):
                continue
            u = x[:, : self.rows(name, x.shape[1])]
            if module.in_features != u.shape[2]:
                u = u.new_zeros(*u.shape[:2], module.in_features)
            y = module(u)
            if torch.is_grad_enabled():
                outputs.append(y)
        return tuple(outputs)

    def rows(self, name: str, length: int) -> int:
        """To how many tokens the layer applies a projection."""
        return self.layer.n_global_tokens if name.startswith("global_") else length

    def upstream(self, length: int) -> tuple[Tensor, ...]:
        """Gradients of the outputs; all are views of one tensor, as their values don't matter."""
        sizes = {n: (self.rows(n, length), m.out_features) for n, m in self.linears.items()}
        values = torch.randn(max(rows * width for rows, width in sizes.values()))
        order = list(sizes)
        if self.chained:
            order = ["o_proj", *(n for n in sizes if n not in ("q_proj", "o_proj"))]
        return tuple(values[: sizes[n][0] * sizes[n][1]].view(1, *sizes[n]) for n in order)


@lru_cache(None)
def module(name: str, shape: Shape) -> nn.Module:
    """A peer, a layer of the registry, `FLOOR + layer`, or `layer + COMPILED`."""
    if name.endswith(COMPILED):
        return torch.compile(module(name.removesuffix(COMPILED), shape))
    if name.startswith(FLOOR):
        return LinearFloor(module(name.removeprefix(FLOOR), shape))
    if name in PEERS:
        return PEERS[name].build(shape)
    options = {key: shape.local for key in LOCAL_OPTIONS if key in layer_options(name)}
    return build_layer(name, shape.d_model, shape.n_heads, **options)


@lru_cache(8)
def sequence(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """The input of all modules, `[1, length, d_model]`, and the gradient that they get."""
    x, upstream = (torch.randn(1, length, shape.d_model) for _ in range(2))
    return x.requires_grad_(), upstream


def case(name: str, shape: Shape, length: int) -> Case:
    """A contender or an operation over a sequence of that length."""
    if name in OPERATIONS:
        return operation_case(name, shape, length)
    contender = module(name, shape)
    x, upstream = sequence(shape, length)

    def call() -> tuple[Tensor, ...]:
        y: Any = contender(x)
        if isinstance(contender, LinearFloor):
            return y
        return (y if isinstance(y, Tensor) else y[0],)

    gradients = contender.upstream(length) if isinstance(contender, LinearFloor) else (upstream,)
    return Case(call, (x, *contender.parameters()), gradients)


def decode(name: str, shape: Shape, context: int) -> tuple[Callable[[], Any], int]:
    """One token of a layer after `context` others, and the bytes of the state between them."""
    layer, x = module(name, shape), sequence(shape, context)[0].detach()
    with torch.no_grad():
        _, state = layer(x)

    def run() -> None:
        with torch.no_grad():
            layer(x[:, :1], state)

    return run, sum(tensor.nbytes for tensor in state)
