"""Argument checks whose messages say what was expected, what came, and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor


def expect_shape(name: str, x: Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    """Raise ValueError unless x has this shape; None allows any size."""
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
