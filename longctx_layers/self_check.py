"""`longctx_layers.selfcheck()`: each backend against the reference, on the user's own machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx_layers import ops
from longctx_layers.ops import BACKENDS, FarKeys, Segments
from longctx_layers.ops.backends import RefusedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Check(NamedTuple):
    """One backend's result for one call.

    Attributes:
        case: the operation, and what the call has of special.
        backend: its name.
        dtype: of the inputs.
        output, gradient: the largest errors, in units of what their dtype allows; None: not run.
        reason: why the backend does not run the call, or why it failed; empty if it is right.
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
        return f"{self.case:<32} {self.backend:<8} {name:<9} {''.join(errors)}  {verdict}"


class _Draw:
    """Random inputs: the same numbers in every dtype and on every device."""

    def __init__(self, length: int) -> None:
        self.length, self.generator = length, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def segments(self) -> Segments:
        """Two rows: one that began earlier and holds two segments, one shorter and padded."""
        index, cut = torch.arange(self.length), self.length // 3
        start = torch.where(index < cut, -5, cut)
        return Segments(
            torch.stack([start, torch.zeros_like(start)]),
            torch.tensor([self.length, self.length - cut]),
        )

    def attention(self, prefix: int = 0, far: bool = False, **options: Any) -> dict[str, Any]:
        length = self.length
        found = {"q": self(2, 4, length, 64), **options}
        found |= {name: self(2, 2, prefix + length, 64) for name in "kv"}
        if far:
            lists, mask = -(-length // 64), self(2, 1, length, 3) > 0
            k, v = (self(2, 2, lists, 3, 64) for _ in range(2))
            found["far"] = FarKeys(self(2, 4, length, 64), k, v, mask, 64)
        return found

    def state_space(self, **options: Any) -> dict[str, Any]:
        dt = self(2, self.length, 4).abs()
        x, directions = self(2, self.length, 4, 64), (self(2, self.length, 32) for _ in range(2))
        found = {"x": x, "dt": dt / 8, "A": -self(4).abs(), **options}
        return found | dict(zip("BC", directions, strict=True))

    def gate(self) -> dict[str, Any]:
        found = {name: self(2, self.length, 4, 64) for name in "zos"}
        return found | {name: self(4, 64) for name in ("weight_o", "weight_s")}


def _cases(length: int) -> dict[str, Callable[[], tuple[str, dict[str, Any]]]]:
    """Calls by name: the operation and its arguments, tensors in float64."""

    def attention(make: Callable[[_Draw], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return "sparse_attention", make(_Draw(length))

    def state(draw: _Draw) -> Tensor:
        return draw(2, 4, 64, 32)

    def space(
        name: str, packed: bool, tokens: int = length, **options: Any
    ) -> tuple[str, dict[str, Any]]:
        draw = _Draw(tokens)
        given = draw.state_space(**options)
        if packed:
            pair = state(draw), state(draw)
            given["initial_state"] = pair if name == "block_ssd" else pair[0]
            given["segments"] = draw.segments()
        return name, given

    def scan() -> tuple[str, dict[str, Any]]:
        draw = _Draw(length)
        return "diagonal_scan", {"u": draw(2, length, 96), "log_decay": -draw(96).abs() / 8}

    def convolution() -> tuple[str, dict[str, Any]]:
        draw = _Draw(length)
        return "conv_silu", {"x": draw(2, length, 96), "weight": draw(96, 4)}

    patterns: dict[str, Callable[[_Draw], dict[str, Any]]] = {
        "full": lambda draw: draw.attention(),
        "window, prefix": lambda draw: draw.attention(prefix=40, window_size=40),
        "window, packed": lambda draw: draw.attention(window_size=40, segments=draw.segments()),
        "window, far keys": lambda draw: draw.attention(far=True, window_size=40),
        "chunks": lambda draw: draw.attention(chunk_size=32),
        "one token": lambda _: _Draw(1).attention(prefix=8 * length),
    }
    return {
        **{f"attention: {name}": partial(attention, make) for name, make in patterns.items()},
        "ssd": partial(space, "ssd", False),
        "ssd: packed": partial(space, "ssd", True),
        "ssd: one token": partial(space, "ssd", True, 1),
        "block_ssd": partial(space, "block_ssd", False, chunk_size=32),
        "block_ssd: packed": partial(space, "block_ssd", True, chunk_size=32, chunk_shift=5),
        "block_ssd: one token": partial(space, "block_ssd", True, 1, chunk_size=32),
        "diagonal_scan": scan,
        "conv_silu": convolution,
        "gated_norms": lambda: ("gated_norms", _Draw(length).gate()),
    }


_Results = tuple[list[Tensor], list[Tensor]]

# Arguments that stay in the state's precision, float32 at least.
_PRECISE = ("dt", "A", "log_decay", "initial_state", "weight_o", "weight_s", "weight")


def _converted(given: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments in a dtype, on a device, all that can have a gradient with one."""

    def one(name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            parts = [one(name, part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.to(device) if isinstance(x, Tensor) else x
        wanted = torch.promote_types(dtype, torch.float32) if name in _PRECISE else dtype
        return x.detach().to(device, wanted, copy=True).requires_grad_()

    return {name: one(name, x) for name, x in given.items()}


def _results(name: str, given: dict[str, Any], backend: str) -> _Results:
    """Outputs, and the gradients of all inputs under a fixed loss."""
    device = tree_leaves(given)[0].device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        return _gradients(name, given, backend)


def _gradients(name: str, given: dict[str, Any], backend: str) -> _Results:
    outputs = tree_leaves(getattr(ops, name)(**given, backend=backend))
    if (segments := given.get("segments")) is not None:  # what stands at pads is unspecified
        real = segments.real()
        shape = (len(real), 1, -1, 1) if name == "sparse_attention" else (len(real), -1, 1, 1)
        outputs[0] = torch.where(real.view(shape), outputs[0], 0)
    leaves = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return [x.detach() for x in outputs], list(gradients)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64."""
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {list(expected.shape)}, got {list(actual.shape)}")
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def error_budget(
    actual: Tensor,
    same_dtype_reference: Tensor,
    oracle: Tensor,
    *,
    scale: float | None = None,
    factor: float = 2.0,
) -> float:
    """The largest error that a result may have, by a tolerance taken from the data.

    Args:
        actual: the fast path's result.
        same_dtype_reference: the reference on the same, rounded inputs.
        oracle: the reference in float64 on the same, rounded inputs.
        scale: magnitude whose rounding is unavoidable: max |oracle| by default; for gradients of
            attention also `max|dO| * max|V|`, or the operation's like.
        factor: how many times the reference's own error is allowed.
    """
    scale = oracle.abs().max().item() if scale is None and oracle.numel() else scale or 0.0
    band = torch.finfo(actual.dtype).eps * scale
    return factor * (max_error(same_dtype_reference, oracle) + band)


def _ratio(error: float, allowed: float) -> float:
    return 0.0 if error == 0 else error / allowed if allowed > 0 and error == error else math.inf


def _compare(found: _Results, own: _Results, exact: _Results) -> list[float]:
    """Largest errors of outputs and of gradients, in units of the budget."""
    ratios = []
    for kind, (actual, expected, oracle) in enumerate(zip(found, own, exact, strict=True)):
        # Gradients meet on their way, and small ones are differences of large ones.
        scale = max(x.abs().max().item() for x in oracle) if kind else None
        ratios.append(
            max(
                _ratio(max_error(x, z), error_budget(x, y, z, scale=scale))
                for x, y, z in zip(actual, expected, oracle, strict=True)
            )
        )
    return ratios


def checks(
    device: torch.device | str,
    *,
    backends: tuple[str, ...] = BACKENDS[:-1],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    length: int = 200,
) -> Iterator[Check]:
    """Compare each backend with the reference, call by call, as `selfcheck` does."""
    device = torch.device(device)
    for case, make in _cases(length).items():
        name, given = make()
        for dtype in dtypes:
            rounded = _converted(given, dtype, device)
            own = _results(name, rounded, "reference")
            exact = _results(name, _converted(rounded, torch.float64, device), "reference")
            for backend in backends:
                try:
                    found = _results(name, rounded, backend)
                except RefusedError as error:
                    reason = str(error).partition("can't run this call: ")[2] or str(error)
                    yield Check(case, backend, dtype, None, None, reason.split("; ")[0])
                    continue
                except Exception as error:  # whatever a GPU's driver and compiler may raise
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    yield Check(case, backend, dtype, math.inf, math.inf, reason)
                    continue
                output, gradient = _compare(found, own, exact)
                right = max(output, gradient) <= 1
                reason = "" if right else "an error beyond what the dtype allows"
                yield Check(case, backend, dtype, output, gradient, reason)


def selfcheck(device: torch.device | str | None = None) -> bool:
    """Compare every backend that runs here with the reference, in seconds, and print a table.

    Outputs, final states and all gradients, in float32, bfloat16 and float16. Errors are printed
    in units of what the dtype allows: twice the error of the reference in that dtype, and rounding.

    Args:
        device: a GPU if there is one, else the CPU.

    Returns:
        Whether all of them are right.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'call':<32} {'backend':<8} {'dtype':<9} {'output':>8}{'gradient':>8}")
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
