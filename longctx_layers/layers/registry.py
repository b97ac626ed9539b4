"""The registry of layers: models, programs, tests and benchmarks find a layer here by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from longctx_layers.layers.base import Layer
from longctx_layers.layers.bigbird import BigBird
from longctx_layers.layers.blade import BLADE
from longctx_layers.layers.causal import CausalAttention
from longctx_layers.layers.dpassm import DPASSM
from longctx_layers.layers.longformer import Longformer
from longctx_layers.layers.window import WindowAttention
from longctx_layers.ops.checks import closest

LayerType = TypeVar("LayerType", bound=type[Layer[Any]])

LAYERS: dict[str, type[Layer[Any]]] = {
    "vanilla": CausalAttention,
    "window": WindowAttention,
    "dpassm": DPASSM,
    "blade": BLADE,
    "baseline_longformer": Longformer,
    "baseline_bigbird": BigBird,
}
# Other names that are understood wherever a layer is asked for by name.
ALIASES = {"longformer": "baseline_longformer", "bigbird": "baseline_bigbird"}


@overload
def register_layer(name: str) -> Callable[[LayerType], LayerType]: ...
@overload
def register_layer(name: str, cls: LayerType) -> LayerType: ...
def register_layer(name: Any, cls: Any = None) -> Any:
    """Make a layer of your own known by a name, for `build_layer`, models and all programs.

    Also a decorator, `@register_layer("mine")`. It is built as `cls(d_model, n_heads, **options)`,
    with `dropout`, `device` and `dtype` among the options.

    >>> from longctx_layers import CausalAttention
    >>> @register_layer("positionless")
    ... class Positionless(CausalAttention):
    ...     def __init__(self, d_model, n_heads, **options):
    ...         super().__init__(d_model, n_heads, rope_base=None, **options)
    >>> build_layer("positionless", 64, 4).rope_base is None
    True
    >>> del LAYERS["positionless"]

    Raises:
        TypeError: if the class is not a `Layer`.
        ValueError: if the name is taken.
    """
    if cls is None:
        return lambda decorated: register_layer(name, decorated)
    if not (inspect.isclass(cls) and issubclass(cls, Layer)):
        raise TypeError(f"{name}: expected a subclass of longctx_layers.Layer, got {cls!r}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string, got {name!r}; pass e.g. 'mine'")
    if name in LAYERS or name in ALIASES:
        taken = LAYERS[canonical_name(name)].__name__
        raise ValueError(f"{name!r} is the name of {taken} already; register under another name")
    LAYERS[name] = cls
    return cls


def canonical_name(name: str) -> str:
    """The name in `LAYERS` of an alias; any other name as it is, known or not."""
    return ALIASES.get(name, name)


def layer_name(name: str) -> str:
    """The name in `LAYERS` of a name or alias.

    >>> layer_name("longformer")
    'baseline_longformer'

    Raises:
        ValueError: for an unknown name; the closest valid one is given.
    """
    name = canonical_name(name)
    if name not in LAYERS:
        hint = closest(str(name), [*LAYERS, *ALIASES])
        raise ValueError(f"unknown layer {name!r}{hint} (the layers are {list(LAYERS)})")
    return name


def layer_options(name: str) -> list[str]:
    """The options that `build_layer` accepts for a layer of the registry.

    >>> layer_options("window")[:2]
    ['window_size', 'n_global_tokens']
    """
    return list(layer_parameters(name))


def layer_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The options of a layer with their defaults.

    A class that passes `**options` on has those of its base class too.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for cls in LAYERS[layer_name(name)].__mro__:
        if "__init__" not in vars(cls):
            continue
        own = inspect.signature(vars(cls)["__init__"]).parameters
        kinds = {parameter.kind for parameter in own.values()}
        for option, parameter in own.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                parameters.setdefault(option, parameter)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return parameters


def build_layer(name: str, d_model: int, n_heads: int, **options: Any) -> Layer[Any]:
    """Build a layer by its name in `LAYERS`.

    >>> build_layer("window", 64, 4, window_size=16).window_size
    16

    Args:
        name: `vanilla`, `window`, `dpassm`, `blade`, `baseline_longformer`, `baseline_bigbird`,
            the short forms `longformer` and `bigbird`, or a name given to `register_layer`.
        d_model: width of the input and output.
        n_heads: query heads.
        options: of that layer; see its class.

    Raises:
        ValueError: for an unknown name or option (the valid ones are listed), or a wrong value.
    """
    name = layer_name(name)
    valid = layer_options(name)
    unknown = [option for option in options if option not in valid]
    if unknown:
        hint = closest(unknown[0], valid)
        raise ValueError(f"{name} has no options {unknown}{hint} (its options are {valid})")
    cls: Callable[..., Layer[Any]] = LAYERS[name]
    return cls(d_model, n_heads, **options)
