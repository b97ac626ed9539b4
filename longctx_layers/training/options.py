"""What the model's flags mean, checked before any data is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longctx_layers import build_layer
from longctx_layers.layers import layer_name, layer_options
from longctx_layers.lm.factory import SIZES

BLOCK_FLAGS = (
    "window_size", "ssm_state_dim", "chunk_size", "state_dim", "n_global_tokens", "n_random_tokens",
)  # fmt: skip


def block_options(
    names: Sequence[str], flags: Mapping[str, Any], block_kwargs: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The options of each block by its name, from flags that may concern some of them only.

    Args:
        names: the blocks of the pattern.
        flags: the model's flags, of which `BLOCK_FLAGS` count; None where one was not given.
        block_kwargs: further options, by block name where there are several blocks.

    Raises:
        ValueError: for an unknown block, or an option that no block of the pattern has.
    """
    for name in names:
        layer_name(name)
    given = {option: flags[option] for option in BLOCK_FLAGS if flags[option] is not None}
    further = dict(block_kwargs or {})
    if not set(further) <= set(names):
        if len(set(names)) > 1:
            raise ValueError(
                f"block_kwargs: expected options by block name, out of {list(names)}, got "
                f"{sorted(further)}; pass e.g. {{{names[0]}: {{...}}}}"
            )
        further = {names[0]: further}
    accepted = {name: [o for o in given if o in layer_options(name)] for name in names}
    stray = sorted(set(given).difference(*accepted.values()))
    if stray:
        hidden = ("device", "dtype")
        valid = {
            name: [o for o in layer_options(name) if o not in hidden]
            for name in dict.fromkeys(names)
        }
        lists = "; ".join(f"{name} has {options}" for name, options in valid.items())
        raise ValueError(f"{', '.join(stray)}: no option of {', '.join(valid)}: {lists}")
    return {
        name: {**{o: given[o] for o in accepted[name]}, **further.get(name, {})} for name in names
    }


def check_blocks(num_params: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Build each block once, without weights: what is impossible raises ValueError or TypeError."""
    one_of("num_params", num_params, SIZES)
    size = SIZES[num_params]
    for name, given in options.items():
        build_layer(name, size.d_model, size.n_heads, **given, device="meta")


def check_numbers(flags: Mapping[str, Any]) -> None:
    """Raise ValueError unless the model's numeric flags are within their bounds."""
    rates = ("learning_rate", "gate_learning_rate", "weight_decay")
    for name in (*rates, "gradient_clip_val", "warmup_steps"):
        if flags[name] is not None:
            between(name, flags[name], 0)
    between("final_learning_rate", flags["final_learning_rate"], 0, 1)
    between("dropout", flags["dropout"], 0, math.nextafter(1, 0))


def one_of(name: str, value: Any, valid: Any) -> None:
    """Raise ValueError, which names the valid values, unless the value is one of them."""
    if value not in valid:
        raise ValueError(f"{name}: expected one of {list(valid)}, got {value!r}; choose one")


def between(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the number is finite and within both bounds."""
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}: expected a number {limits}, got {value}; change it")
