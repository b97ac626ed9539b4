"""Which parameters take weight decay, in any model that contains layers of this library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from longctx_layers.layers.parameters import declared_no_decay
from longctx_layers.ops.checks import expect_number


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Make an optimizer's groups: each trainable parameter once, with or without weight decay.

    Weight decay applies to matrices: projections, convolutions, embeddings, adapters. It does not
    apply to biases and other parameters of fewer than two dimensions, to norms, and to what the
    layers declare (time scales and skips of state spaces, scales of norms by head, the gates
    between two paths, memory tokens), nor to parameters with the attribute `_no_weight_decay`. A
    parameter that several modules share is listed once, without decay if one of them excludes it.

    >>> model = create_model(vocab_size=256, num_params="tiny")
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('decay', 0.1), ('no_decay', 0.0)]

    Args:
        model: any module: your own, a converted one, wrapped by PEFT, DDP, FSDP or torch.compile.
        weight_decay: of the first group.

    Returns:
        One or two groups, `{"name": "decay", "params": [...], "weight_decay": weight_decay}` and
        `{"name": "no_decay", "params": [...], "weight_decay": 0.0}`. An empty group is left out.

    Raises:
        TypeError: if the model is not a module.
        ValueError: for a negative weight decay, or if FSDP has joined parameters in a way that
            hides which is which.
    """
    _expect_module("parameter_groups", model)
    expect_number("weight_decay", weight_decay)
    if not weight_decay >= 0:
        raise ValueError(
            f"weight_decay: expected a number of at least 0, got {weight_decay}; pass 0 for none"
        )
    excluded = {id(parameter) for _, parameter in _excluded(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "name": "decay",
            "params": [p for p in trainable if id(p) not in excluded],
            "weight_decay": weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in trainable if id(p) in excluded],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of all parameters to which `parameter_groups` applies no weight decay.

    For optimizers that choose by name: timm calls a method of this name on a model.

    >>> sorted(no_weight_decay(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.RMSNorm(2))))
    ['0.bias', '1.weight']

    Raises:
        TypeError, ValueError: as for `parameter_groups`.
    """
    _expect_module("no_weight_decay", model)
    return {name for name, _ in _excluded(model)}


def _expect_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}: expected a module, got {type(model).__name__}; pass the model itself, "
            "since only its modules know what their parameters are"
        )


def _excluded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    declared = declared_no_decay(model)
    dimensions = _flattened(model)
    for path, module in model.named_modules(remove_duplicate=False):
        norm = _is_norm(module)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            # DeepSpeed's ZeRO-3 replaces a parameter that is stored elsewhere by an empty one.
            n_dims = len(getattr(parameter, "ds_shape", parameter.shape))
            if (
                norm
                or full in declared
                or dimensions.get(id(parameter), n_dims) < 2
                or name.endswith("bias")
                or getattr(parameter, "_no_weight_decay", False)
            ):
                yield full, parameter


def _is_norm(module: nn.Module) -> bool:
    # By the name of the class: most models of transformers define their own.
    return re.search(r"norm(\dd)?$", type(module).__name__.lower()) is not None


def _flattened(model: nn.Module) -> dict[int, int]:
    """Dimensions of parameters that FullyShardedDataParallel stores as flat vectors."""
    dimensions: dict[int, int] = {}
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is None:
            continue
        if flat._params is None:
            raise ValueError(
                "model: expected FullyShardedDataParallel(..., use_orig_params=True), got one that "
                "joins weights and norms in one parameter; pass that option, or use fully_shard"
            )
        dimensions |= {id(p): len(s) for p, s in zip(flat._params, flat._shapes, strict=True)}
    return dimensions
