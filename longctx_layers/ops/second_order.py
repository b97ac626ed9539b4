"""Second derivatives of implementations whose backward pass autograd can't differentiate.

A backward pass that is written by hand, in Triton or in a library returns gradients without a
history: differentiating them again would fail, or silently give zero. Such an implementation runs
between two identities, `_Enter` and `_Leave`. In an ordinary backward pass they pass the gradients
on. With `create_graph=True` autograd records the backward pass too; then `_Enter` replaces the
gradients by those of a composed form: the same mathematics in operations that autograd can
differentiate any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def twice_differentiable(
    fast: Callable[..., Any], composed: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`fast(*args, **kwargs)`, with gradients that can be differentiated again.

    Not for calls that `torch.func` transforms: what surrounds `fast` has no rules for them.

    Args:
        fast: an implementation whose gradients are right but can't be differentiated.
        composed: the same function in torch operations; it runs only in backward passes with
            `create_graph=True`.
        args, kwargs: their arguments. Tensors may be inside tuples. With an argument `dropout_p`
            above 0 there are no second derivatives: the random numbers of `fast` are not known.

    Returns:
        What `fast` returns: a tensor, or tensors in tuples.

    >>> def square(x):
    ...     return x * x
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = twice_differentiable(square, square, x)
    >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
    >>> torch.autograd.grad(slope, x)
    (tensor(2.),)
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
        return fast(*args, **kwargs)
    tensors: list[Tensor] = []
    arguments = _without_tensors((args, kwargs), tensors)
    if not any(x.requires_grad for x in tensors):
        return fast(*args, **kwargs)
    call = _Call(composed, arguments)
    entered = _Enter.apply(call, *tensors)
    args, kwargs = _with_tensors(arguments, _merged(tensors, entered))
    outputs: list[Tensor] = []
    results = _without_tensors(fast(*args, **kwargs), outputs)
    left = _Leave.apply(call, *(y for y in outputs if y.requires_grad))
    return _with_tensors(results, _merged(outputs, left))


def own_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the hand-written backward pass of an `autograd.Function`.

    It has no derivatives of its own, and runs without autocast, as the forward pass does: with
    `loss.backward()` under `torch.autocast`, its products would otherwise be rounded.
    """

    @once_differentiable
    @wraps(backward)
    def without_autocast(ctx: Any, *gradients: Tensor) -> Any:
        device = gradients[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return without_autocast


class _Call:
    """What the two ends of a call share.

    Attributes:
        gradients: of the outputs, from `_Leave` to `_Enter` in one backward pass.
    """

    def __init__(self, composed: Callable[..., Any], arguments: Any) -> None:
        self.composed = composed
        self.arguments = arguments
        self.gradients: tuple[Tensor | None, ...] = ()

    def differentiate(
        self, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients of the tensors that need one, with a history."""
        gradients = self.gradients
        self.gradients = ()
        # Aliases: one input may be computed from another, or be the same tensor.
        inputs = [x.view_as(x) if n else x for x, n in zip(tensors, needed, strict=True)]
        args, kwargs = _with_tensors(self.arguments, inputs)
        if kwargs.get("dropout_p", 0.0) > 0:
            raise RuntimeError(
                "create_graph=True: expected dropout 0 for second derivatives of this kernel, got "
                f"dropout_p = {kwargs['dropout_p']}; set dropout to 0, or run the forward pass "
                "with use_backend('reference')"
            )
        outputs: list[Tensor] = []
        device = tensors[0].device.type
        with torch.autocast(device, enabled=False):  # as in the forward pass
            _without_tensors(self.composed(*args, **kwargs), outputs)
        pairs = zip((y for y in outputs if y.requires_grad), gradients, strict=False)
        used = [(y, dy) for y, dy in pairs if dy is not None]
        wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
        if not used:
            return [None] * len(wanted)
        ys, dys = zip(*used, strict=True)
        return list(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))


class _Enter(torch.autograd.Function):
    """Passes on the tensors that require a gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return tuple(x.detach() for x in tensors if x.requires_grad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # exactly with create_graph=True
            gradients = tuple(ctx.call.differentiate(ctx.saved_tensors, needed))
        each = iter(gradients)
        return (None, *(next(each) if n else None for n in needed))


class _Leave(torch.autograd.Function):
    """Passes on the outputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tuple(y.detach() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.call.gradients = gradients
        return (None, *gradients)


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in a tree of arguments."""

    index: int


def _without_tensors(tree: Any, tensors: list[Tensor]) -> Any:
    """The tree with a slot for each tensor, which is appended to the list."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _Slot(len(tensors) - 1)
    return _map(lambda part: _without_tensors(part, tensors), tree)


def _with_tensors(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, _Slot):
        return tensors[tree.index]
    return _map(lambda part: _with_tensors(part, tensors), tree)


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: function(part) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [function(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _merged(tensors: list[Tensor], replaced: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors, with those that require a gradient replaced."""
    each = iter(replaced)
    return [next(each) if x.requires_grad else x for x in tensors]
