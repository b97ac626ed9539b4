"""Large calls on a CPU in pieces that fit its caches: a few rows, and a few tokens, at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from longctx_layers.layers.state import map_state

TOKENS_AT_ONCE = 2048

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Fake tensors stand for plain ones where a call is traced or its memory estimated.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_GLOBAL_HOOKS = tuple("_global" + name for name in _HOOKS)


def may_divide(layer: nn.Module, x: Tensor, *, dropout: float = 0.0) -> bool:
    """Whether a call with x `[B, T, D]` may be worked through in pieces without a difference.

    Args:
        layer: the pieces call its submodules, and it once.
        dropout: the layer's own, whose random numbers would be drawn in another order.
    """
    if x.shape[0] * x.shape[1] <= TOKENS_AT_ONCE:
        return False  # it is one piece
    if dropout and layer.training:
        return False
    return works_by_token(*layer.children())


def works_by_token(*modules: nn.Module) -> bool:
    """Whether modules may be called a few rows and tokens at a time instead of once.

    True only for linear layers and modules of this library with plain weights and without hooks.
    Hooks would see pieces, and other modules (adapters that are chosen by row, activations that
    are quantised together, modules with a state) may depend on the rest of the batch.
    """
    if _global_hooks():
        return False
    return all(_is_plain(part) for module in modules for part in module.modules())


def may_bypass(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether an operation may use the modules' weights instead of calling the modules.

    True only where nothing can tell the difference: modules of exactly this class, with plain
    weights and without hooks.
    """
    if _global_hooks():
        return False
    return all(type(module) is kind and _is_unchanged(module) for module in modules)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of its own see the module's calls or change them."""
    return any(getattr(module, name) for name in _HOOKS)


def _global_hooks() -> bool:
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    if kind is not nn.Linear and not kind.__module__.startswith("longctx_layers."):
        return False
    return _is_unchanged(module)


def _is_unchanged(module: nn.Module) -> bool:
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    weights = (*module._parameters.values(), *module._buffers.values())
    return all(weight is None or type(weight) in _PLAIN for weight in weights)


def by_rows(
    call: Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]],
    x: Tensor,
    state: Any,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Any]:
    """`call(x, state, segment_ids)`, a few rows at a time: rows never depend on each other."""
    few = TOKENS_AT_ONCE // x.shape[1] or 1
    if len(x) <= few:
        return call(x, state, segment_ids)
    calls = []
    for first in range(0, len(x), few):
        rows = slice(first, first + few)
        before = None if state is None else map_state(operator.itemgetter(rows), state)
        calls.append(call(x[rows], before, None if segment_ids is None else segment_ids[rows]))
    ys, states = zip(*calls, strict=True)
    return torch.cat(ys), type(states[0])(*map(torch.cat, zip(*states, strict=True)))


def lengths(batch: int, length: int, grain: int, first: int) -> list[int]:
    """Lengths of pieces of a call: multiples of `grain` but for the last.

    One of `first` tokens stands before them. What makes no two pieces stays whole.
    """
    size = grain * max(1, TOKENS_AT_ONCE // (max(1, batch) * grain))
    if length < first + 2 * size:
        return [length]
    *begins, last = range(first, length, size)
    return [first] * (first > 0) + [size] * len(begins) + [length - last]
