"""The dispatcher: operations, their backends in order of preference, and which one runs a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from longctx_layers.ops.checks import closest
from longctx_layers.ops.examples import Examples
from longctx_layers.ops.second_order import twice_differentiable

ENVIRONMENT_VARIABLE = "LONGCTX_BACKEND"


class Kind(NamedTuple):
    """What the dispatcher answers for a backend before it asks the backend itself.

    Attributes:
        devices: the types of devices that it runs on; None for any.
        needs: `devices` in words.
        composed: whether it is made of torch operations alone. Then it also runs on empty tensors,
            and autograd differentiates it in forward mode and any number of times.
        eager: whether it takes only plain tensors outside of compilers and torch.func.
    """

    devices: tuple[str, ...] | None = None
    needs: str = ""
    composed: bool = False
    eager: bool = False


# In order of preference. Backends of third parties take their place in one operation's order, and
# are of the default kind.
KINDS = {
    "triton": Kind(devices=("cuda",), needs="a GPU"),
    "flash": Kind(devices=("cuda",), needs="a GPU", eager=True),
    "flex": Kind(devices=("cuda", "cpu"), needs="a GPU or a CPU", eager=True),
    "cpu": Kind(devices=("cpu",), needs="a CPU", eager=True),
    "torch": Kind(composed=True),
    "reference": Kind(composed=True),
}
BACKENDS = tuple(KINDS)
_THIRD_PARTY = Kind()


class RefusedError(ValueError):
    """A backend that was asked for by name can't run the call."""


class Choice(NamedTuple):
    """One backend's answer to one call: `reason` says why it was refused, or not automatic."""

    operation: str
    backend: str
    chosen: bool
    reason: str

    def __str__(self) -> str:
        mark = "->" if self.chosen else "  "
        return f"{mark} {self.operation:<20} {self.backend:<10} {self.reason}"


class Backend(NamedTuple):
    """An implementation of one operation; see `register_backend` for the arguments."""

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] | None = None
    reserve: Callable[..., str | None] | None = None


def forward_mode() -> bool:
    """Whether the call computes forward-mode derivatives, by `torch.func` or by dual numbers.

    They do not depend on the gradient mode: `torch.no_grad` leaves them on.
    """
    # torch has no public function for this; `torch.func.jvp` enters a dual level too.
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether `torch.func` transforms the call, or forward-mode derivatives are computed."""
    return forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None


def _obstacles(x: Tensor) -> tuple[str | None, str | None]:
    """Why a call on x is nothing for backends that are not composed, and for eager ones."""
    if x.numel() == 0:
        reason = f"takes no empty tensors, got one of shape {list(x.shape)}"
        return reason, reason
    if torch.compiler.is_compiling():
        return None, "is not traced by torch.compile or torch.export"
    if forward_mode():
        reason = "has no forward-mode derivatives"
        return reason, reason
    if transformed():
        return None, "has no rules for transforms of torch.func"
    if type(x) not in (Tensor, nn.Parameter, FakeTensor):  # fake tensors represent plain ones
        return None, f"needs plain tensors, got a {type(x).__name__}"
    return None, None


def _reserve_oracle(*_: Any, **__: Any) -> str:
    return "the oracle: never chosen automatically"


# Plain globals, not context variables: torch.compile reads them and guards on them. The environment
# may name a backend that is yet to be registered, so that it is checked by the first call.
forced = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
record: list[Choice] | None = None


class Operation:
    """A named operation with its backends in their order of preference.

    Args:
        name: that of the function in `longctx_layers.ops`.
        examples: calls with which `longctx_layers.selfcheck` compares the backends.
        precise: arguments that are in float32 at least, whatever the dtype of the others.
        token_dim: the dimension of the first output that counts tokens.

    Attributes:
        backends: by name; None where the operation has no such backend.
    """

    def __init__(
        self,
        name: str,
        examples: Examples | None = None,
        precise: tuple[str, ...] = (),
        token_dim: int = 1,
    ) -> None:
        self.name = name
        self.examples = {} if examples is None else examples
        self.precise = precise
        self.token_dim = token_dim
        self.backends: dict[str, Backend | None] = dict.fromkeys(BACKENDS)
        OPERATIONS[name] = self

    def register(
        self,
        name: str,
        refuse: Callable[..., str | None] | None = None,
        reserve: Callable[..., str | None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add one of the library's own backends; see `register_backend`."""
        if name == "reference":
            reserve = _reserve_oracle

        def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(name, run, refuse, reserve)
            return run

        return decorate

    def available(self) -> list[str]:
        """The names of this operation's backends, in order of preference."""
        return [name for name, backend in self.backends.items() if backend is not None]

    def choices(self, *args: Any, backend: str | None = None, **kwargs: Any) -> list[Choice]:
        """Every backend with the reason for or against it, for this very call."""
        wanted = forced if backend is None else backend
        chosen, reasons = self._decide(_first_tensor(args), wanted, args, kwargs, ask_all=True)
        return [
            Choice(self.name, name, chosen is not None and name == chosen.name, reason)
            for name, reason in reasons.items()
        ]

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        wanted = forced if backend is None else backend
        if not torch.compiler.is_compiling() and record is not None:
            record.extend(self.choices(*args, backend=backend, **kwargs))
            # `explain` records every operation, even if the forced backend refuses one of them.
            wanted = "auto"
        x = _first_tensor(args)
        chosen, reasons = self._decide(x, wanted, args, kwargs)
        if chosen is None:
            raise self._refusal(wanted, reasons)
        run = chosen.run
        if (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not KINDS.get(chosen.name, _THIRD_PARTY).composed
            and not transformed()
        ):
            composed = self.backends["torch"]
            assert composed is not None
            run = partial(twice_differentiable, run, composed.run)
        device = x.device.type
        if device == "meta":  # which autocast does not support
            return run(*args, **kwargs)
        # Operations choose their own precision (states and decays in float32); autocast must not.
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)

    def _decide(
        self,
        x: Tensor,
        wanted: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ask_all: bool = False,
    ) -> tuple[Backend | None, dict[str, str]]:
        """The backend that runs a call, or None, and each one's reason for or against it.

        Backends are asked in order until one runs the call; with `ask_all`, all of them.
        """
        if wanted != "auto" and wanted not in self.backends and wanted not in all_names():
            raise unknown_backend(self.name, wanted, self.available())
        obstacle, eager_obstacle = _obstacles(x)
        chosen: Backend | None = None
        reasons = {}
        for name, backend in self.backends.items():
            asked_for = wanted in ("auto", name)
            if not (asked_for or ask_all):
                continue
            kind = KINDS.get(name, _THIRD_PARTY)
            reason: str | None = None
            if backend is None:
                reason = "not available for this operation"
            elif obstacle is not None and not kind.composed:
                reason = obstacle
            elif eager_obstacle is not None and kind.eager:
                reason = eager_obstacle
            elif kind.devices is not None and x.device.type not in kind.devices:
                reason = f"needs {kind.needs}, got a tensor on {x.device.type!r}"
            elif backend.refuse is not None:
                reason = backend.refuse(*args, **kwargs)
            if reason is None and not asked_for:
                reason = f"{wanted!r} was asked for"
            if reason is None and chosen is not None:
                reason = "accepts the call, but a faster backend comes first"
            if reason is None and wanted == "auto" and backend and backend.reserve is not None:
                reason = backend.reserve(*args, **kwargs)
            if reason is None:
                chosen = backend
                reason = "runs this call"
            reasons[name] = reason
            if chosen is not None and not ask_all:
                break
        return chosen, reasons

    def _refusal(self, wanted: str, reasons: dict[str, str]) -> RefusedError:
        if wanted == "auto":
            return RefusedError(
                f"{self.name}: expected a backend that accepts this call, got none: "
                + "; ".join(f"{name} {reason}" for name, reason in reasons.items())
            )
        if self.backends.get(wanted) is None:
            return RefusedError(
                f"{self.name}: expected a backend that implements this operation, got {wanted!r}; "
                f"use one of {('auto', *self.available())}"
            )
        return RefusedError(
            f"{self.name}: backend {wanted!r} was asked for and can't run this call: "
            f"{reasons[wanted]}; use backend='auto', or see longctx_layers.explain"
        )


OPERATIONS: dict[str, Operation] = {}


def all_names() -> dict[str, None]:
    """`"auto"` and the backends of all operations."""
    names = dict.fromkeys(("auto", *BACKENDS))
    for operation in OPERATIONS.values():
        names |= dict.fromkeys(operation.backends)
    return names


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    x: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return x


def unknown_backend(source: str, name: str, names: Iterable[str]) -> ValueError:
    """The error about a name that is none of `names`, to be raised by `source`."""
    valid = tuple(dict.fromkeys(("auto", *names)))
    return ValueError(
        f"{source}: unknown backend {name!r}, expected one of {valid}{closest(name, valid)}"
    )
