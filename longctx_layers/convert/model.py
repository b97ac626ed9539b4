"""What a converted model does differently from its class in transformers.

Its class becomes a subclass of the same name, so that the methods which transformers calls on a
model know of the converted layers: how their weights are drawn, and how `generate` marks pads.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from longctx_layers.hf.generation import GeneratesWithPads
from longctx_layers.layers.init import draw_own


class ConvertedModel:
    """Mixin before a model or decoder of transformers."""

    _base: type[PreTrainedModel]

    def _init_weights(self, module: nn.Module) -> None:
        if not draw_own(module):
            super()._init_weights(module)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Under the name of this class, pickle finds that of transformers.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, (self._base,), *reduced[2:])


def converted_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model's class for its converted models, always the same one."""
    if issubclass(base, ConvertedModel):
        return base
    if "_converted" not in vars(base):
        generates = (GeneratesWithPads,) if issubclass(base, GenerationMixin) else ()
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_base": base}
        made = type(base.__name__, (ConvertedModel, *generates, base), names)
        base._converted = made  # type: ignore[attr-defined]
    return base._converted  # type: ignore[attr-defined]


def adopt(model: nn.Module, decoder: PreTrainedModel) -> None:
    """Give a decoder, and the models around it that generate, their converted classes."""
    for module in model.modules():
        around = isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin)
        if module is decoder or (around and decoder in set(module.modules())):
            kind: Any = type(module)
            module.__class__ = converted_class(kind)


def _empty(base: type[PreTrainedModel]) -> PreTrainedModel:
    made = converted_class(base)
    return made.__new__(made)
