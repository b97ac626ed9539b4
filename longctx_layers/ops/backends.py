"""Backends: which implementation runs a call, and why; how to choose one, or to add your own.

An operation's name is the mathematics; a backend is one implementation of it. `"auto"` takes the
first backend that accepts the call, never the reference or another one that is reserved for those
who ask for it. A backend that is asked for by name runs or raises: there is no silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from longctx_layers.ops import operation
from longctx_layers.ops.checks import closest
from longctx_layers.ops.operation import (
    BACKENDS,
    OPERATIONS,
    Backend,
    Choice,
    Operation,
    RefusedError,
    all_names,
    unknown_backend,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "Operation",
    "RefusedError",
    "Registration",
    "explain",
    "register_backend",
    "use_backend",
]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on the named backend, which runs or raises.

    Args:
        name: `"auto"`, or the name of a backend: `"reference"`, `"torch"`, `"cpu"`, `"triton"`,
            `"flash"`, `"flex"`, or one that `register_backend` has added.

    >>> import torch
    >>> from longctx_layers.ops import diagonal_scan, use_backend
    >>> with use_backend("reference"):
    ...     h, final = diagonal_scan(torch.ones(1, 3, 2), torch.zeros(2))
    >>> h[0, :, 0]
    tensor([1., 2., 3.])
    """
    if name not in all_names():
        raise unknown_backend("use_backend", name, all_names())
    previous = operation.forced
    operation.forced = name
    try:
        yield
    finally:
        operation.forced = previous


@contextmanager
def _recording() -> Iterator[list[Choice]]:
    previous = operation.record
    record: list[Choice] = []
    operation.record = record
    try:
        yield record
    finally:
        operation.record = previous


class Registration:
    """A backend that `register_backend` has added, until `remove` or the end of a `with` block."""

    def __init__(self, owner: Operation, name: str) -> None:
        self.owner = owner
        self.name = name

    def remove(self) -> None:
        """Remove the backend from its operation. A second call does nothing."""
        self.owner.backends.pop(self.name, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_backend(
    operation: str,
    name: str,
    run: Callable[..., Any],
    refuse: Callable[..., str | None] | None = None,
    reserve: Callable[..., str | None] | None = None,
    before: str | None = None,
) -> Registration:
    """Add your own implementation of an operation: layers then use it wherever it accepts a call.

    `run`, `refuse` and `reserve` are called with the arguments that the operation's reference in
    `longctx_layers.ops.reference` takes. They get no empty tensors and no forward-mode derivatives,
    which the torch backend handles. Second derivatives are those of the torch backend, so that a
    hand-written backward pass needs no history.

    Args:
        operation: its name, such as `"sparse_attention"` or `"ssd"`.
        name: the backend's new name, as in `use_backend(name)` and `explain`.
        run: the implementation.
        refuse: returns why it can't run a call, or None if it can. None: it runs every call.
        reserve: returns why it runs a call only if it is asked for by name, or None.
        before: the backend of this operation that it precedes under `"auto"`. None: all of them.

    Returns:
        A handle whose `remove()` takes the backend away again; also a context manager.

    Raises:
        ValueError: for unknown operations and backends, and for names that are taken.

    >>> import torch
    >>> from longctx_layers.ops import diagonal_scan, explain, register_backend
    >>> def run(u, log_decay, *, initial_state, segments):
    ...     return u.cumsum(1) + initial_state[:, None], initial_state + u.sum(1)
    >>> def refuse(u, log_decay, *, initial_state, segments):
    ...     return "sums without decay only" if segments or log_decay.any() else None
    >>> with register_backend("diagonal_scan", "cumsum", run, refuse):
    ...     print(explain(diagonal_scan, torch.ones(1, 3, 2), torch.zeros(2))[0])
    -> diagonal_scan        cumsum     runs this call
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"register_backend: unknown operation {operation!r}, expected one of "
            f"{tuple(OPERATIONS)}{closest(operation, OPERATIONS)}"
        )
    owner = OPERATIONS[operation]
    if name == "auto" or name in owner.backends:
        raise ValueError(
            f"register_backend: the name {name!r} is taken for {operation}; choose another one, or "
            "remove the backend that has it"
        )
    if before is not None and before not in owner.backends:
        raise ValueError(
            f"register_backend: before={before!r} is unknown, expected one of "
            f"{tuple(owner.backends)}{closest(before, owner.backends)}"
        )
    place = 0 if before is None else list(owner.backends).index(before)
    backends: list[tuple[str, Backend | None]] = list(owner.backends.items())
    backends.insert(place, (name, Backend(name, run, refuse, reserve)))
    owner.backends.clear()
    owner.backends.update(backends)
    return Registration(owner, name)


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Say which backend each operation of a call runs on, and why the others do not.

    Args:
        call: a layer, a model, or one of the functions of `longctx_layers.ops`; it is run once,
            without gradients, on the arguments that follow.

    Returns:
        One `Choice` for each operation and backend, without repetitions; `print` them line by
        line for a table.

    >>> import torch
    >>> from longctx_layers.ops import diagonal_scan, explain
    >>> for choice in explain(diagonal_scan, torch.ones(1, 3, 2), torch.zeros(2)):
    ...     if choice.chosen:
    ...         print(choice)
    -> diagonal_scan        torch      runs this call
    """
    with torch.no_grad(), _recording() as rows:
        call(*args, **kwargs)
    return list(dict.fromkeys(rows))
