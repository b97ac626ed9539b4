"""Custom operator of `ssd` and `block_ssd`: how torch calls the kernels in `ssd_*.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.ssd_backward import backward
from longctx_layers.kernels.ssd_forward import forward
from longctx_layers.kernels.target import on_its_device

check_import_name(__name__)

_INPUTS = (
    "Tensor x, Tensor dt, Tensor log_decay, Tensor B, Tensor C, Tensor state,"
    " Tensor? start=None, Tensor? until=None"
)

ssd = torch.library.custom_op(
    "longctx::ssd",
    on_its_device(forward),
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)


@ssd.register_fake
def _(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


_ssd_backward = torch.library.custom_op(
    "longctx::ssd_backward",
    on_its_device(backward),
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dfinal, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_ssd_backward.register_fake
def _(dy: Tensor, dfinal: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape) for z in inputs[:6] if z is not None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    return *_ssd_backward(dy, dfinal, *ctx.saved_tensors), None, None


ssd.register_autograd(_gradients, setup_context=_save)
