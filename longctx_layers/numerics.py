"""Tolerances taken from the data: how large an error the dtype of a result excuses."""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, computed in float64.

    >>> max_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    0.5
    """
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
    """The largest error that a result may have, from the error of a plain computation.

    Args:
        actual: the fast path's result.
        same_dtype_reference: the reference on the same, rounded inputs.
        oracle: the reference in float64 on the same, rounded inputs.
        scale: magnitude whose rounding is unavoidable, `max|oracle|` by default. For gradients use
            the largest that flows through the operation, such as `max|dO| * max|V|` in attention.
        factor: how many times the reference's own error is allowed.

    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> rounded = x.bfloat16()
    >>> error_budget(rounded, rounded, x) == 2 * 2 * torch.finfo(torch.bfloat16).eps
    True
    """
    if scale is None:
        scale = oracle.abs().max().item() if oracle.numel() else 0.0
    band = torch.finfo(actual.dtype).eps * scale
    return factor * (max_error(same_dtype_reference, oracle) + band)
