"""Which parameters take weight decay, in any model that contains layers of this library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from longctx_layers.layers.parameters import declared_no_decay
from longctx_layers.ops.checks import expect_number


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: every trainable parameter once, with or without weight decay.

    Matrices decay: projections, convolutions, embeddings, adapters. Biases and all else of fewer
    than two dimensions, norms, and what the layers declare (time scales and skips of state spaces,
    the scales of norms by head, the gates between two paths, memory tokens) do not. Neither does a
    parameter with the attribute `_no_weight_decay`. Parameters that several modules share are
    counted once and do not decay if they must not in one of them.

    Args:
        model: any module: your own, a converted one, wrapped by PEFT, DDP, FSDP or torch.compile.
        weight_decay: of the first group.

    Returns:
        One or two groups, `{"name": "decay", "params": [...], "weight_decay": weight_decay}` and
        `{"name": "no_decay", "params": [...], "weight_decay": 0.0}`; an empty one is left out.

    Raises:
        TypeError: if the model is no module.
        ValueError: for a negative decay, or parameters that FSDP has flattened beyond recognition.
    """
    _expect_module("parameter_groups", model)
    expect_number("weight_decay", weight_decay)
    if not weight_decay >= 0:
        raise ValueError(
            f"weight_decay: expected a number of at least 0, got {weight_decay}; pass 0 for none"
        )
    quiet = {id(parameter) for _, parameter in _quiet(model)}
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "name": "decay",
            "params": [p for p in found if id(p) not in quiet],
            "weight_decay": weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in found if id(p) in quiet],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that `parameter_groups` leaves without weight decay, all of them.

    For optimizers that choose by name: timm calls a method of this name on a model.

    Raises:
        TypeError, ValueError: as `parameter_groups`.
    """
    _expect_module("no_weight_decay", model)
    return {name for name, _ in _quiet(model)}


def _expect_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}: expected a module, got {type(model).__name__}; pass the model "
            "itself, since its modules know what their parameters are"
        )


def _quiet(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    declared = declared_no_decay(model)
    dimensions = _flattened(model)
    for path, module in model.named_modules(remove_duplicate=False):
        norm = _is_norm(module)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            # DeepSpeed's ZeRO-3 leaves an empty parameter in place of one that lies elsewhere.
            own = len(getattr(parameter, "ds_shape", parameter.shape))
            if (
                norm
                or full in declared
                or dimensions.get(id(parameter), own) < 2
                or name.endswith("bias")
                or getattr(parameter, "_no_weight_decay", False)
            ):
                yield full, parameter


def _is_norm(module: nn.Module) -> bool:
    # By name too: most models of transformers have a class of their own.
    return re.search(r"norm(\dd)?$", type(module).__name__.lower()) is not None


def _flattened(model: nn.Module) -> dict[int, int]:
    """Dimensions of parameters whose shards FullyShardedDataParallel holds as flat vectors."""
    found: dict[int, int] = {}
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is None:
            continue
        if flat._params is None:
            raise ValueError(
                "model: expected FullyShardedDataParallel(..., use_orig_params=True), got one that "
                "joins weights and norms in one parameter; pass that option, or use fully_shard"
            )
        found |= {id(p): len(s) for p, s in zip(flat._params, flat._shapes, strict=True)}
    return found
