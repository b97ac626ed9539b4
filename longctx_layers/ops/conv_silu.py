"""The short causal convolution in front of a selective state space, with its SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.ops import availability, reference
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_shape
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.segments import Segments

_operation = Operation(
    "conv_silu",
    examples={
        "": lambda draw: {"x": draw(2, draw.length, 96), "weight": draw(96, 4)},
        "packed": lambda draw: {
            "x": draw(2, draw.length, 96),
            "weight": draw(96, 4),
            "before": draw(2, 3, 96),
            "segments": draw.segments(),
        },
    },
    precise=("weight",),
)


def conv_silu(
    x: Tensor,
    weight: Tensor,
    *,
    before: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> Tensor:
    """A short causal convolution per channel, then SiLU: `SiLU(sum_n weight_n x_(t - W + 1 + n))`.

    Args:
        x: `[B, T, C]`.
        weight: `[C, W]`; the last column weighs the token itself.
        before: `[B, W - 1, C]`, the inputs before the first token, in x's dtype; None for zeros.
        segments: tokens see no inputs of earlier segments; None for one segment.
        backend: see `longctx_layers.explain`.

    Returns:
        `[B, T, C]` in x's dtype, computed in float32 at least and rounded once.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Dao and Gu, Mamba-2, arXiv 2405.21060.

    >>> import torch
    >>> conv_silu(torch.randn(1, 10, 6), torch.randn(6, 4)).shape
    torch.Size([1, 10, 6])
    """
    expect_float("x", x, "[B, T, C]")
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, C], got a tensor of shape {list(x.shape)}")
    batch, length, channels = x.shape
    expect_shape("weight", weight, (channels, None), "[C, W]")
    if before is not None:
        expect_shape("before", before, (batch, weight.shape[1] - 1, channels), "[B, W - 1, C]")
        expect_dtype("before", before, x.dtype)
    if segments is not None:
        expect_shape("segments.start", segments.start, (batch, length), "[B, T]")
    result: Tensor = _operation(x, weight, before=before, segments=segments, backend=backend)
    return result


@_operation.register("triton", refuse=availability.refuse_triton)
def _triton(
    x: Tensor, weight: Tensor, *, before: Tensor | None, segments: Segments | None
) -> Tensor:
    from longctx_layers.kernels.conv_silu import conv_silu as kernel  # imports Triton

    start = None if segments is None else segments.start
    y: Tensor = kernel(x, weight, before, start)
    return y


@_operation.register("torch")
def _torch(
    x: Tensor, weight: Tensor, *, before: Tensor | None, segments: Segments | None
) -> Tensor:
    width = weight.shape[1]
    length = x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0)) if before is None else torch.cat([before, x], dim=1)
    precise = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(precise).mT.contiguous()  # a strided one would not be vectorised
    # From the padded copy, not from x: so only the copy is kept for the backward pass.
    y = padded[:, width - 1 :].to(precise) * taps[-1]
    for back in range(1, width):
        earlier = padded[:, width - 1 - back : width - 1 - back + length]
        if segments is not None:
            index = torch.arange(length, device=x.device)
            earlier = torch.where((index - back >= segments.start)[..., None], earlier, 0)
        y = torch.addcmul(y, earlier.to(precise), taps[-1 - back])
    return F.silu(y).to(x.dtype)


_operation.register("reference")(reference.conv_silu)
