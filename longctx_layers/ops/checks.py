"""Checks of arguments, whose errors say what was expected, what came, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor


def closest(name: object, valid: Iterable[object]) -> str:
    """A hint such as `"; did you mean 'torch'?"`, empty if nothing is close to `name`."""
    matches = difflib.get_close_matches(str(name), [str(value) for value in valid], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def expect_tensor(name: str, x: object, layout: str) -> None:
    """Raise TypeError unless x is a dense tensor; `layout` is the shape to name in the error."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a tensor {layout}, got a {type(x).__name__}; make one with "
            "torch.as_tensor"
        )
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor {layout}, got a nested one; pad it with "
            "torch.nested.to_padded_tensor, and give the pads negative segment ids"
        )
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor {layout}, got layout {x.layout}; use .to_dense()"
        )


def expect_float(name: str, x: Tensor, layout: str) -> None:
    """Raise unless x is a dense tensor of real floating-point numbers."""
    expect_tensor(name, x, layout)
    if not x.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point numbers, got {x.dtype}; convert it with .float()"
        )


def expect_shape(
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    layout: str,
    remedy: str = "pass a tensor of this shape",
) -> None:
    """Raise unless x is a dense tensor of this shape; None allows any size.

    The error about a wrong size ends with `remedy`.
    """
    expect_tensor(name, x, layout)
    fits = x.dim() == len(shape)
    if fits:
        for expected, size in zip(shape, x.shape, strict=True):
            if expected is not None and expected != size:
                fits = False
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        if x.dim() != len(shape):
            remedy = f"reshape it to {len(shape)} dimensions"
        raise ValueError(f"{name}: expected {layout} = [{sizes}], got {list(x.shape)}; {remedy}")


def expect_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless x has this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}; convert it with .to({dtype})")


def expect_positive(name: str, value: int) -> None:
    """Raise unless value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {value!r}; pass a whole number")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}; pass a larger number")


def expect_count(name: str, value: int) -> None:
    """Raise unless value is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}; pass a whole number")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}; pass 0 for none")


def expect_number(name: str, value: object) -> None:
    """Raise TypeError unless value is an integer or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}; pass an int or a float")


def expect_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {choices}, got {value!r}{closest(value, choices)}"
        )
