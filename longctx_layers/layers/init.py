"""Initial values of weights, and how transformers learns that a module has them."""

from __future__ import annotations

from torch import Tensor, nn


def draw_weight(weight: Tensor, scale: float = 1.0) -> None:
    """Initialise `[outputs, inputs]`: normal, `std = scale / sqrt(inputs)`, to keep variances.

    Source: LeCun et al., Efficient BackProp, 1998.
    """
    nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)


def draw_linear(linear: nn.Linear) -> None:
    """Initialise a projection: its weight with the `first_scale` that was set on it; bias zero."""
    draw_weight(linear.weight, getattr(linear, "first_scale", 1.0))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def draw_own(module: nn.Module) -> bool:
    """Initialise the parameters that a module of this library itself holds, not its submodules.

    Returns:
        False for modules of other libraries, which are not changed.
    """
    if hasattr(module, "first_scale"):
        if isinstance(module, nn.Linear):
            draw_linear(module)
            return True
        if isinstance(module, nn.Embedding):
            draw_weight(module.weight, getattr(module, "first_scale", 1.0))
            return True
    draw = getattr(module, "draw_own", None)
    if draw is not None:
        draw()
    return draw is not None


# transformers replaces the functions of torch.nn.init while it initialises weights itself.
_NORMAL = nn.init.normal_


def already_drawn(parameter: Tensor) -> bool:
    """Whether transformers initialises what a checkpoint lacks, and this parameter was loaded."""
    return nn.init.normal_ is not _NORMAL and getattr(parameter, "_is_hf_initialized", False)


def set_first(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter its initial value, unless it is `already_drawn`.

    The functions of `torch.nn.init` need no such check: transformers guards them.
    """
    if not already_drawn(parameter):
        parameter.copy_(value)


def mark_drawn(module: nn.Module) -> None:
    """Mark weights as initialised, so that a later `init_weights` of transformers keeps them.

    Nothing is marked on the meta device, where there are no values, or while transformers
    initialises weights itself, since it marks them, too.
    """
    if nn.init.normal_ is not _NORMAL or any(p.is_meta for p in module.parameters()):
        return
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
