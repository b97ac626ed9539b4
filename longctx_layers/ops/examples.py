"""Random inputs from which operations make their example calls, for `longctx_layers.selfcheck`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longctx_layers.ops.segments import Segments


class Draw:
    """Random numbers, the same in every process and on every device.

    >>> Draw(length=5)(2, 3).shape
    torch.Size([2, 3])
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def segments(self) -> Segments:
        """Two rows: one has two segments, the first from an earlier call; one ends with padding."""
        index = torch.arange(self.length)
        cut = self.length // 3
        start = torch.where(index < cut, -5, cut)
        return Segments(
            torch.stack([start, torch.zeros_like(start)]),
            torch.tensor([self.length, self.length - cut]),
        )


# By what is special about each call: a function that draws its arguments, floats in float64.
Examples = Mapping[str, Callable[[Draw], dict[str, Any]]]
