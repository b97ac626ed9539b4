"""Checks of a layer's arguments, with errors that say what was expected and how to repair it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longctx_layers.layers.parameters import is_activation_dtype
from longctx_layers.layers.state import Field
from longctx_layers.ops.checks import expect_dtype, expect_shape


def check_input(name: str, x: Tensor, d_model: int, projection: nn.Module | None) -> None:
    """Raise unless x is `[B, T, d_model]` with the dtype and device of a projection's weight.

    A projection without a plain weight, for example a quantised one, checks x itself.
    """
    remedy = "pass activations of this width, or build the layer with theirs"
    expect_shape(f"{name}: x", x, (None, None, d_model), "[B, T, d_model]", remedy)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if x.device != weight.device:
        raise ValueError(
            f"{name}: x: expected a tensor on {weight.device}, like the parameters, got one on "
            f"{x.device}; move one of them with .to(...)"
        )
    if x.dtype == weight.dtype or not is_activation_dtype(weight.dtype):
        return
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        expect_dtype(f"{name}: x", x, weight.dtype)


def check_segment_ids(name: str, segment_ids: Tensor, x: Tensor) -> None:
    """Raise unless segment_ids are integers `[B, T]` on x's device."""
    remedy = "pass one id for each token of x"
    expect_shape(f"{name}: segment_ids", segment_ids, tuple(x.shape[:2]), "[B, T]", remedy)
    if segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
        raise TypeError(
            f"{name}: segment_ids: expected integers, got {segment_ids.dtype}; number the "
            "segments from 0, and mark padding with -1"
        )
    if segment_ids.device != x.device:
        raise ValueError(
            f"{name}: segment_ids: expected a tensor on {x.device}, like x, got one on "
            f"{segment_ids.device}; move it with .to(...)"
        )


def check_state(
    name: str,
    state: Any,
    state_type: type[Any],
    fields: dict[str, Field],
    x: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise unless the state has this type and these fields, for x's batch size and device."""
    if not isinstance(state, state_type):
        raise TypeError(
            f"{name}: state: expected a {state_type.__name__}, got a {type(state).__name__}; pass "
            "the state that this layer returned, or init_state(batch_size)"
        )
    for key, field in fields.items():
        value = getattr(state, key)
        label = f"{name}: state.{key}"
        if value.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{label}: expected batch size {len(x)}, like x, got {list(value.shape)}; choose "
                "rows of the state with select_rows, or start from init_state(batch_size)"
            )
        expect_shape(label, value, (len(x), *field.shape), "[B, ...]")
        if value.device != x.device:
            raise ValueError(
                f"{label}: expected a tensor on {x.device}, like x, got one on {value.device}; "
                "move the state with state_to"
            )
        if field.kind != "cache":
            expect_dtype(label, value, field.dtype(dtype))
