"""Argument checks whose messages say what was expected, what came, and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor


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


def expect_shape(name: str, x: Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    """Raise unless x is a dense tensor of this shape; None allows any size."""
    expect_tensor(name, x, layout)
    if x.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, x.shape, strict=True)
    ):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name}: expected {layout} = [{sizes}], got {list(x.shape)}; reshape or transpose it"
        )


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
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}; choose one of them")
