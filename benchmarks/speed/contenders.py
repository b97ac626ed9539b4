"""Everything that can be timed, by name: layers, their linear floors, peers, operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.speed.common import Case, Shape, local_options, state_bytes
from benchmarks.speed.operations import OPERATIONS, operation_case
from benchmarks.speed.peers import PEERS
from longctx_layers import LAYERS, build_layer
from longctx_layers.layers import Layer

FLOOR = "linears of "
COMPILED = ", compiled"
PROBE = 64  # tokens of the call that counts what each projection takes


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear projections of a layer, by name."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def count_tokens(layer: nn.Module, x: Tensor) -> dict[str, int]:
    """How many tokens each `nn.Linear` takes during `layer(x)`, by name in the order of calls."""
    counts: dict[str, int] = {}

    def count_for(name: str) -> Callable[..., None]:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] = counts.get(name, 0) + inputs[0].shape[:-1].numel()

        return count

    hooks = [
        linear.register_forward_pre_hook(count_for(name))
        for name, linear in linears_of(layer).items()
    ]
    with torch.no_grad():
        layer(x)
    for hook in hooks:
        hook.remove()
    return counts


class LinearFloor(nn.Module):
    """Only the linear projections of a layer, which cannot be faster than these.

    They are the layer's own modules, each applied to as many tokens as the layer applies it to:
    all of them, or a fixed number, such as that of the global tokens. The output projection of an
    attention layer takes the output of the query projection; all others take the layer's input.
    """

    def __init__(self, layer: Layer[Any]) -> None:
        super().__init__()
        self.layer = layer
        counts = count_tokens(layer, torch.zeros(1, PROBE, layer.d_model))
        self.fixed = {name: count for name, count in counts.items() if count != PROBE}
        linears = linears_of(layer)
        self.linears = {name: linears[name] for name in counts}
        self.output: nn.Linear | None = None
        if {"q_proj", "o_proj"} <= self.linears.keys():
            self.output = self.linears.pop("o_proj")

    def tokens(self, name: str, length: int) -> int:
        """To how many tokens of a sequence of that length the layer applies a projection."""
        return self.fixed.get(name, length)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for name, linear in self.linears.items():
            u = x[:, : self.tokens(name, x.shape[1])]
            if linear.in_features != x.shape[2]:
                u = u.new_zeros(*u.shape[:2], linear.in_features)
            y = linear(u)
            if name == "q_proj" and self.output is not None:
                y = self.output(y)
            if torch.is_grad_enabled() or not outputs:
                outputs.append(y)
        return tuple(outputs)

    def upstream(self, length: int) -> tuple[Tensor, ...]:
        """Gradients of the outputs; all are views of one tensor, since values do not matter."""
        shapes = []
        for name, linear in self.linears.items():
            last = self.output if name == "q_proj" and self.output is not None else linear
            shapes.append((1, self.tokens(name, length), last.out_features))
        values = torch.randn(max(map(math.prod, shapes)))
        return tuple(values[: math.prod(shape)].view(shape) for shape in shapes)


@lru_cache(None)
def registered(name: str, shape: Shape) -> Layer[Any]:
    """A layer of the registry."""
    return build_layer(name, shape.d_model, shape.n_heads, **local_options(name, shape.local))


@lru_cache(None)
def floor(layer: str, shape: Shape) -> LinearFloor:
    """The linear floor of a layer of the registry."""
    return LinearFloor(registered(layer, shape))


@lru_cache(None)
def module(name: str, shape: Shape) -> nn.Module:
    """A peer, a layer of the registry, `FLOOR + layer`, or `layer + COMPILED`."""
    if name.endswith(COMPILED):
        return cast(nn.Module, torch.compile(module(name.removesuffix(COMPILED), shape)))
    if name.startswith(FLOOR):
        return floor(name.removeprefix(FLOOR), shape)
    if name in PEERS:
        return PEERS[name].build(shape)
    return registered(name, shape)


def floors(names: Iterable[str], shape: Shape) -> list[str]:
    """The floors of those names that are layers of the registry and have linear projections."""
    return [FLOOR + name for name in names if name in LAYERS and floor(name, shape).linears]


@lru_cache(8)
def sequence(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """The input of all modules, `[1, length, d_model]`, and the gradient of their output."""
    x = torch.randn(1, length, shape.d_model, requires_grad=True)
    upstream = torch.randn(1, length, shape.d_model)
    return x, upstream


def case(name: str, shape: Shape, length: int) -> Case:
    """A module or an operation, applied to a sequence of that length."""
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
    """A layer's step of one token after `context` others, and the bytes of its state then."""
    layer = module(name, shape)
    x = sequence(shape, context)[0].detach()
    with torch.no_grad():
        _, state = layer(x)

    def run() -> None:
        with torch.no_grad():
            layer(x[:, :1], state)

    return run, state_bytes(state)
