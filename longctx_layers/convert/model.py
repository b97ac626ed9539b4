"""The classes of converted models.

A converted model that can generate becomes an instance of a subclass of its transformers class. The
subclass has the same name, and its `generate` marks padding in the attention mask.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from longctx_layers.transformers_calls.generation import GeneratesWithPads


class ConvertedModel:
    """Mixin, placed before the transformers class, that makes converted models picklable."""

    _base: type[PreTrainedModel]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By the name of this class, pickle would find the original class.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, (self._base,), *reduced[2:])


def converted_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the subclass of a transformers class for converted models; one for each class.

    A class that cannot generate needs none and is returned itself.
    """
    if issubclass(base, ConvertedModel) or not issubclass(base, GenerationMixin):
        return base
    if "_converted" not in vars(base):
        members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_base": base}
        subclass = type(base.__name__, (ConvertedModel, GeneratesWithPads, base), members)
        base._converted = subclass  # type: ignore[attr-defined]
    return base._converted  # type: ignore[attr-defined]


def adopt(model: nn.Module, decoder: PreTrainedModel) -> None:
    """Change the classes of the models that contain the decoder, itself included."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and decoder in set(module.modules()):
            original: Any = type(module)
            module.__class__ = converted_class(original)


def _empty(base: type[PreTrainedModel]) -> PreTrainedModel:
    """Make an instance of the converted class without calling `__init__`, for unpickling."""
    subclass = converted_class(base)
    return subclass.__new__(subclass)
