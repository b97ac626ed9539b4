"""Backends: which implementation runs a call, and why.

An operation's name is the mathematics; a backend is an implementation of it. `"auto"` takes the
first registered backend that accepts the call, never the reference or another that is reserved for
those who ask for it. A backend that is asked for by name runs or raises: nothing falls back in
silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from longctx_layers.ops.second_order import twice_differentiable

BACKENDS = ("triton", "flash", "flex", "cpu", "torch", "reference")
# Made of operations that autograd can differentiate any number of times.
COMPOSED = ("torch", "reference")
ENVIRONMENT_VARIABLE = "LONGCTX_BACKEND"


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


class _Backend(NamedTuple):
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    reserve: Callable[..., str | None]


def _no_reason(*_: Any, **__: Any) -> None:
    return None


def _reserve_oracle(*_: Any, **__: Any) -> str:
    return "the oracle: never chosen automatically"


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: expected a backend out of {('auto', *BACKENDS)}, got {name!r}; "
            "choose one of them"
        )
    return name


# A plain global, not a context variable: torch.compile reads it and guards on it.
_forced = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
_record: list[Choice] | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on the named backend, which runs or raises.

    Args:
        name: `"auto"`, `"reference"`, `"torch"`, `"cpu"`, `"triton"`, `"flash"` or `"flex"`.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def _recording() -> Iterator[list[Choice]]:
    global _record
    previous, _record = _record, []
    try:
        yield _record
    finally:
        _record = previous


class Operation:
    """A named operation with its backends, tried in the order of their registration."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, _Backend] = {}

    def register(
        self,
        backend: str,
        refuse: Callable[..., str | None] = _no_reason,
        reserve: Callable[..., str | None] = _no_reason,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add an implementation.

        Args:
            backend: its name, one of `BACKENDS`.
            refuse: called with the operation's arguments; returns why it can't run them, or None.
            reserve: likewise; returns why it runs them only when asked for by name, or None.
        """
        if backend == "reference":
            reserve = _reserve_oracle

        def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[_checked(backend, self.name)] = _Backend(run, refuse, reserve)
            return run

        return decorate

    def choices(self, *args: Any, backend: str | None = None, **kwargs: Any) -> list[Choice]:
        """Every backend with the reason for or against it, for this very call."""
        wanted = _forced if backend is None else _checked(backend, self.name)
        found, rows = False, []
        for name in BACKENDS:
            if name not in self.backends:
                reason = "not available for this operation"
            else:
                candidate = self.backends[name]
                refusal = candidate.refuse(*args, **kwargs)
                if refusal is not None:
                    reason = refusal
                elif wanted not in ("auto", name):
                    reason = f"{wanted!r} was asked for"
                elif wanted == "auto" and (why := candidate.reserve(*args, **kwargs)) is not None:
                    reason = why
                elif found:
                    reason = "accepts the call, but a faster backend comes first"
                else:
                    found = True
                    rows.append(Choice(self.name, name, True, "runs this call"))
                    continue
            rows.append(Choice(self.name, name, False, reason))
        return rows

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        wanted = _forced if backend is None else backend
        if not torch.compiler.is_compiling() and _record is not None:
            _record.extend(self.choices(*args, backend=backend, **kwargs))
            wanted = "auto"  # the answers count; a refused backend must not end the questions
        run = self._select(args, kwargs, wanted)
        if args[0].device.type == "meta":  # autocast does not know it
            return run(*args, **kwargs)
        # Operations choose their own precision (states and decays in float32); autocast must not.
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args, **kwargs)

    def _select(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str
    ) -> Callable[..., Any]:
        if wanted == "auto":
            for name, candidate in self.backends.items():
                refused = candidate.refuse(*args, **kwargs) is not None
                if not refused and candidate.reserve(*args, **kwargs) is None:
                    return self._run(name)
        elif _checked(wanted, self.name) in self.backends:
            candidate = self.backends[wanted]
            refusal = candidate.refuse(*args, **kwargs)
            if refusal is None:
                return self._run(wanted)
            raise RefusedError(
                f"{self.name}: backend {wanted!r} was asked for and can't run this call: "
                f"{refusal}; use backend='auto', or see longctx_layers.explain"
            )
        raise RefusedError(
            f"{self.name}: expected a backend out of {('auto', *self.backends)}, got {wanted!r}; "
            "the others do not implement this operation"
        )

    def _run(self, name: str) -> Callable[..., Any]:
        run = self.backends[name].run
        if name in COMPOSED:
            return run
        return partial(twice_differentiable, run, self.backends["torch"].run)


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Say which backend each operation of a call runs on, and why the others do not.

    Args:
        call: a layer, a model, or one of the functions of `longctx_layers.ops`; it is run once,
            without gradients, on the arguments that follow.

    Returns:
        One `Choice` for each operation and backend, without repetitions; `print` them line by
        line for a table.
    """
    with torch.no_grad(), _recording() as record:
        call(*args, **kwargs)
    return list(dict.fromkeys(record))
