"""Checks of the model's options, before any data is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from longctx_layers import build_layer
from longctx_layers.command_line import closest
from longctx_layers.layers import layer_name, layer_options
from longctx_layers.lm.factory import SIZES

BLOCK_FLAGS = (
    "window_size",
    "ssm_state_dim",
    "chunk_size",
    "state_dim",
    "n_global_tokens",
    "n_random_tokens",
)


def block_options(
    names: Sequence[str], flags: Mapping[str, Any], block_kwargs: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Distribute options among the blocks of a pattern: each gets those that it has.

    Args:
        names: the blocks of the pattern.
        flags: the model's options, of which only `BLOCK_FLAGS` are used; None is the default.
        block_kwargs: further options, by block name if there are several blocks.

    Raises:
        ValueError: for an unknown block, or an option that no block of the pattern has.

    >>> flags = dict.fromkeys(BLOCK_FLAGS) | {"window_size": 64}
    >>> block_options(["dpassm", "vanilla"], flags, {"dpassm": {"ssm": "diagonal"}})
    {'dpassm': {'window_size': 64, 'ssm': 'diagonal'}, 'vanilla': {}}
    """
    for name in names:
        layer_name(name)
    options = {name: flags[name] for name in BLOCK_FLAGS if flags[name] is not None}
    further = dict(block_kwargs or {})
    if not set(further) <= set(names):
        if len(set(names)) > 1:
            raise ValueError(
                f"block_kwargs: expected options by block name, out of {list(names)}, got "
                f"{sorted(further)}; pass e.g. {{{names[0]}: {{...}}}}"
            )
        further = {names[0]: further}
    accepted = {name: [o for o in options if o in layer_options(name)] for name in names}
    stray = sorted(set(options).difference(*accepted.values()))
    if stray:
        hidden = ("device", "dtype")
        valid = {
            name: [o for o in layer_options(name) if o not in hidden]
            for name in dict.fromkeys(names)
        }
        lists = "; ".join(f"{name} has {own}" for name, own in valid.items())
        raise ValueError(f"{', '.join(stray)}: no option of {', '.join(valid)}: {lists}")
    return {
        name: {**{o: options[o] for o in accepted[name]}, **further.get(name, {})} for name in names
    }


def check_blocks(num_params: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Build each block once, without weights; impossible options raise ValueError or TypeError."""
    one_of("num_params", num_params, SIZES)
    size = SIZES[num_params]
    for name, own in options.items():
        build_layer(name, size.d_model, size.n_heads, **own, device="meta")


def check_numbers(flags: Mapping[str, Any]) -> None:
    """Raise ValueError unless the model's numeric flags are within their bounds."""
    rates = ("learning_rate", "gate_learning_rate", "weight_decay")
    for name in (*rates, "gradient_clip_val", "warmup_steps"):
        if flags[name] is not None:
            between(name, flags[name], 0)
    between("final_learning_rate", flags["final_learning_rate"], 0, 1)
    between("dropout", flags["dropout"], 0, math.nextafter(1, 0))


def one_of(name: str, value: str, valid: Collection[str]) -> None:
    """Raise ValueError, with the valid values and the closest of them, unless `value` is valid."""
    if value not in valid:
        hint = closest(value, valid) or "; choose one"
        raise ValueError(f"{name}: expected one of {list(valid)}, got {value!r}{hint}")


def between(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless a number is finite and within both bounds."""
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}: expected a number {limits}, got {value}")
