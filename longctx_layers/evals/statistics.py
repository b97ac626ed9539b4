"""95 % intervals: of a proportion, a mean, a paired difference, and an accuracy on text."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_layers.ops.checks import expect_positive

Z = 1.959963984540054  # standard errors from the mean to either end of a 95 % interval
STRETCH = 64  # neighbouring tokens of a text that are treated as one observation


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_interval(values: Tensor) -> Interval:
    """The mean of independent observations `[n]`, with its normal 95 % interval.

    >>> interval = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    >>> f"{interval.mean:.2f} from {interval.low:.2f} to {interval.high:.2f}"
    '2.00 from 0.87 to 3.13'
    """
    values = values.double()
    mean = values.mean().item()
    half = Z * values.std().item() / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(first: Tensor, second: Tensor) -> Interval:
    """The mean of `first - second` over paired observations `[n]`: which of two models is better?

    If both models were measured on the same documents, this interval is far narrower than those of
    the two means.

    >>> paired_interval(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 3.0]))
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    return mean_interval(first.double() - second.double())


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion: `right` successes in `n` trials.

    Unlike the normal interval it is usable for few trials, and for proportions near 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    >>> low, high = wilson(9, 10)
    >>> f"{low:.3f} to {high:.3f}"
    '0.596 to 0.982'
    """
    expect_positive("n", n)
    if not 0 <= right <= n:
        raise ValueError(f"right: expected a number from 0 to n = {n}, got {right}")
    p = right / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_interval(right: Tensor, behind: slice) -> tuple[float, float]:
    """The 95 % interval of the accuracy at some positions of a text that was read in rotations.

    Every rotation reads the same tokens, and neighbouring tokens are alike. Therefore stretches of
    the text are treated as independent, not tokens (a cluster-robust error). The interval is at
    least as wide as Wilson's for the number of tokens in the text, so that it does not collapse if
    all answers are right, or all wrong.

    Args:
        right: `[rotations, T]`, whether each token was predicted, row by row of `rotations(...)`.
        behind: the positions that count.

    >>> right = torch.arange(2000).view(2, 1000) % 2 == 0
    >>> low, high = accuracy_interval(right, slice(500, 1000))
    >>> low < 0.5 < high
    True
    """
    rows, length = right.shape
    shift = length // rows * torch.arange(rows)
    stretch = (torch.arange(length) + shift[:, None]) % length // STRETCH
    chosen = right[:, behind].double().flatten()
    index = stretch[:, behind].flatten()
    empty = torch.zeros(int(stretch.max()) + 1, dtype=torch.float64)
    n_right = empty.index_add(0, index, chosen)
    n_tokens = empty.index_add(0, index, torch.ones_like(chosen))
    accuracy = chosen.mean().item()
    count = int((n_tokens > 0).sum())
    error = (n_right - accuracy * n_tokens).square().sum().sqrt().item() / len(chosen)
    half = Z * error * math.sqrt(count / max(1, count - 1))
    tokens = min(len(chosen), length)
    low, high = wilson(accuracy * tokens, tokens)
    return max(0.0, min(low, accuracy - half)), min(1.0, max(high, accuracy + half))
