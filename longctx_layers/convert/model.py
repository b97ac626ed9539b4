"""What a converted model does differently from its class in transformers.

A model that generates gets a subclass of its class, of the same name, whose `generate` marks pads.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from longctx_layers.transformers_calls.generation import GeneratesWithPads


class ConvertedModel:
    """Mixin before a model of transformers."""

    _base: type[PreTrainedModel]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Under the name of this class, pickle finds that of transformers.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, (self._base,), *reduced[2:])


def converted_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model's class for its converted models, always the same one.

    A class that does not generate needs none, and is returned itself.
    """
    if issubclass(base, ConvertedModel) or not issubclass(base, GenerationMixin):
        return base
    if "_converted" not in vars(base):
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_base": base}
        made = type(base.__name__, (ConvertedModel, GeneratesWithPads, base), names)
        base._converted = made  # type: ignore[attr-defined]
    return base._converted  # type: ignore[attr-defined]


def adopt(model: nn.Module, decoder: PreTrainedModel) -> None:
    """Give the models around a decoder that generate their converted classes."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and decoder in set(module.modules()):
            kind: Any = type(module)
            module.__class__ = converted_class(kind)


def _empty(base: type[PreTrainedModel]) -> PreTrainedModel:
    made = converted_class(base)
    return made.__new__(made)
