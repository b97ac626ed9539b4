"""Custom operator of sparse causal attention, with gradients: how torch calls the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.kernels.attention_backward import backward
from longctx_layers.kernels.attention_forward import empty_by_token, forward
from longctx_layers.kernels.guard import check_import_name
from longctx_layers.kernels.target import on_its_device

check_import_name(__name__)

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor first, Tensor? far_q, Tensor? far_k, Tensor? far_v,"
    " Tensor? far_mask, SymInt far_block, float scale"
)

sparse_attention = torch.library.custom_op(
    "longctx::sparse_attention",
    on_its_device(forward),
    mutates_args=(),
    schema=f"({_CALL}) -> (Tensor, Tensor)",
)


@sparse_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return empty_by_token(q), q.new_empty(q.shape[:3], dtype=precise)


_sparse_attention_backward = torch.library.custom_op(
    "longctx::sparse_attention_backward",
    on_its_device(backward),
    mutates_args=(),
    schema=f"(Tensor do, Tensor dlse, Tensor o, Tensor lse, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_sparse_attention_backward.register_fake
def _(
    do: Tensor,
    dlse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    gradients = [empty_by_token(x) for x in (q, k, v)]
    if far_q is None or far_k is None:
        return (*gradients, *(q.new_empty(0) for _ in range(3)))
    return (*gradients, empty_by_token(q), *(far_k.new_empty(far_k.shape) for _ in range(2)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.far_block, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: with checkpointing, each read recomputes them
    dq, dk, dv, *dfar = _sparse_attention_backward(do, dlse, *saved, ctx.far_block, ctx.scale)
    far = dfar if saved[6] is not None else (None, None, None)
    return dq, dk, dv, None, *far, None, None, None


sparse_attention.register_autograd(_gradients, setup_context=_save)
