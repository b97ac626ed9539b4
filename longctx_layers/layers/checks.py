"""Checks of a call's arguments; their messages say what was expected, what came, and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.parameters import is_activation_dtype
from longctx_layers.layers.state import Field
from longctx_layers.ops.checks import expect_dtype, expect_shape


def check_input(name: str, x: Tensor, d_model: int, weight: Tensor | None) -> None:
    """Raise unless x is `[B, T, d_model]` in the dtype and on the device of a weight.

    A projection without a weight to compare with (None) checks its input itself.
    """
    expect_shape(f"{name}: x", x, (None, None, d_model), "[B, T, d_model]")
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(
            f"{name}: x: expected a tensor on {weight.device}, as the parameters, got one on "
            f"{x.device}; move one of them with .to(...)"
        )
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if is_activation_dtype(weight.dtype) and not autocast:
        expect_dtype(f"{name}: x", x, weight.dtype)


def check_segment_ids(name: str, segment_ids: Tensor, x: Tensor) -> None:
    """Raise unless segment_ids are integers `[B, T]` on x's device."""
    expect_shape(f"{name}: segment_ids", segment_ids, tuple(x.shape[:2]), "[B, T]")
    if segment_ids.is_floating_point() or segment_ids.dtype == torch.bool:
        raise TypeError(
            f"{name}: segment_ids: expected integers, got {segment_ids.dtype}; number the "
            "segments, with -1 at pads"
        )
    if segment_ids.device != x.device:
        raise ValueError(
            f"{name}: segment_ids: expected a tensor on {x.device}, as x, got one on "
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
    """Raise unless the state is of this type, with these fields, for x's batch and device."""
    if not isinstance(state, state_type):
        raise TypeError(
            f"{name}: state: expected a {state_type.__name__}, got a {type(state).__name__}; pass "
            "what this layer returned, or init_state(batch_size)"
        )
    for key, field in fields.items():
        value, what = getattr(state, key), f"{name}: state.{key}"
        if value.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{what}: expected batch size {len(x)}, as x has, got {list(value.shape)}; choose "
                "its rows with select_rows, or begin with init_state(batch_size)"
            )
        expect_shape(what, value, (len(x), *field.shape), "[B, ...]")
        if value.device != x.device:
            raise ValueError(
                f"{what}: expected a tensor on {x.device}, as x, got one on {value.device}; move "
                "the state with state_to"
            )
        if field.kind != "cache":
            expect_dtype(what, value, field.dtype(dtype))
