"""`longctx_layers.selfcheck()`: each backend against the reference, on the user's own machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx_layers import ops
from longctx_layers.numerics import error_budget as error_budget  # also importable from here
from longctx_layers.numerics import max_error as max_error
from longctx_layers.ops.examples import Draw
from longctx_layers.ops.operation import OPERATIONS, Operation, RefusedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Check(NamedTuple):
    """One backend's result for one call.

    Attributes:
        case: the operation, and what is special about the call.
        backend: its name.
        dtype: that of the inputs.
        output, gradient: the largest errors in units of what the dtype allows; None: not run.
        reason: why the backend does not run the call, or how it failed; empty if it is right.
    """

    case: str
    backend: str
    dtype: torch.dtype
    output: float | None
    gradient: float | None
    reason: str

    @property
    def failed(self) -> bool:
        """Whether the backend runs the call and is wrong."""
        return self.output is not None and bool(self.reason)

    def __str__(self) -> str:
        errors = (f"{'-' if x is None else format(x, '.2f'):>8}" for x in self[3:5])
        verdict = "WRONG: " + self.reason if self.failed else self.reason or "right"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.case:<36} {self.backend:<8} {name:<9} {''.join(errors)}  {verdict}"


def _cases(length: int) -> dict[str, tuple[Operation, dict[str, Any]]]:
    """Calls by name: the operation and its arguments, floats in float64."""
    return {
        f"{name}: {label}" if label else name: (operation, draw_arguments(Draw(length)))
        for name, operation in OPERATIONS.items()
        for label, draw_arguments in operation.examples.items()
    }


_Results = tuple[list[Tensor], list[Tensor]]


def _converted(
    operation: Operation, arguments: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments in a dtype, on a device, all that can have a gradient with one."""

    def convert(name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            parts = [convert(name, part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.to(device) if isinstance(x, Tensor) else x
        precise = torch.promote_types(dtype, torch.float32)
        own_dtype = precise if name in operation.precise else dtype
        return x.detach().to(device, own_dtype, copy=True).requires_grad_()

    return {name: convert(name, x) for name, x in arguments.items()}


def _results(operation: Operation, arguments: dict[str, Any], backend: str) -> _Results:
    """Outputs, and the gradients of all inputs under a fixed loss."""
    device = tree_leaves(arguments)[0].device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        return _gradients(operation, arguments, backend)


def _gradients(operation: Operation, arguments: dict[str, Any], backend: str) -> _Results:
    outputs = tree_leaves(getattr(ops, operation.name)(**arguments, backend=backend))
    if (segments := arguments.get("segments")) is not None:  # outputs at padding are unspecified
        real = segments.real()
        shape = [1] * outputs[0].dim()
        shape[0], shape[operation.token_dim] = real.shape
        outputs[0] = torch.where(real.view(shape), outputs[0], 0)
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return [x.detach() for x in outputs], list(gradients)


def _ratio(error: float, allowed: float) -> float:
    return 0.0 if error == 0 else error / allowed if allowed > 0 and error == error else math.inf


def _compare(actual: _Results, same_dtype: _Results, exact: _Results) -> list[float]:
    """Largest errors of outputs and of gradients, in units of the budget."""
    ratios = []
    for kind, tensors in enumerate(zip(actual, same_dtype, exact, strict=True)):
        # Gradients have a common scale: small ones are differences of large ones.
        scale = max(x.abs().max().item() for x in tensors[2]) if kind else None
        ratios.append(
            max(
                _ratio(max_error(x, z), error_budget(x, y, z, scale=scale))
                for x, y, z in zip(*tensors, strict=True)
            )
        )
    return ratios


def checks(
    device: torch.device | str,
    *,
    backends: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    length: int = 200,
) -> Iterator[Check]:
    """Compare each backend with the reference, call by call, as `selfcheck` does.

    `backends` are all but the reference by default, with those that `register_backend` has added.
    """
    device = torch.device(device)
    for case, (operation, arguments) in _cases(length).items():
        for dtype in dtypes:
            rounded = _converted(operation, arguments, dtype, device)
            exact_inputs = _converted(operation, rounded, torch.float64, device)
            same_dtype = _results(operation, rounded, "reference")
            exact = _results(operation, exact_inputs, "reference")
            for backend in operation.backends if backends is None else backends:
                if backend == "reference":
                    continue
                try:
                    actual = _results(operation, rounded, backend)
                except RefusedError as error:
                    reason = str(error).partition("can't run this call: ")[2] or str(error)
                    yield Check(case, backend, dtype, None, None, reason.split("; ")[0])
                    continue
                except Exception as error:  # whatever a GPU's driver and compiler may raise
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    yield Check(case, backend, dtype, math.inf, math.inf, reason)
                    continue
                output, gradient = _compare(actual, same_dtype, exact)
                right = max(output, gradient) <= 1
                reason = "" if right else "an error beyond what the dtype allows"
                yield Check(case, backend, dtype, output, gradient, reason)


def selfcheck(device: torch.device | str | None = None) -> bool:
    """Check in seconds that every backend of this machine computes what the reference does.

    Compares outputs, final states and all gradients in float32, bfloat16 and float16, and prints a
    table of errors in units of what the dtype allows: twice the error of the reference in that
    dtype, plus rounding.

    Args:
        device: a GPU if there is one, else the CPU.

    Returns:
        Whether all backends are right.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'call':<36} {'backend':<8} {'dtype':<9} {'output':>8}{'gradient':>8}")
    wrong, refusals = 0, {}
    for check in checks(device):
        if check.output is None:
            refusals[check.backend] = check.reason
        else:
            print(check)
            wrong += check.failed
    for backend, reason in refusals.items():
        print(f"{backend} refused some or all of them: {reason}")
    print("all right" if not wrong else f"{wrong} wrong: please report them with this table")
    return not wrong
