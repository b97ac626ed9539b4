"""What a layer says about itself, so that nobody has to know it by its name or class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from longctx_layers.layers.parameters import SpecialParameters


class Probe(NamedTuple):
    """Statistics of a layer's memory, computed from what one of its modules returns.

    Attributes:
        module: whose output is read during a forward pass.
        statistics: from that output to scalars by name, e.g. `time_scale`.
    """

    module: nn.Module
    statistics: Callable[[Tensor], dict[str, Tensor]]


class SelfDescription(SpecialParameters):
    """Properties that models, training, evaluation and figures read; a layer overrides its own.

    Attributes:
        output_projection: name of the last projection, whose initial weights a model scales down
            with its depth; None if the layer has no such projection.
        label: what figures and tables call the layer; None for the name in the registry.
        style: colour and matplotlib marker in figures; None for the next free ones.
    """

    output_projection: ClassVar[str | None] = None
    label: ClassVar[str | None] = None
    style: ClassVar[tuple[str, str] | None] = None

    @property
    def reach(self) -> int | None:
        """Tokens in the window or chunk of attention, the query included; None for no limit.

        Memory beyond it (a recurrent state, global or random tokens) does not count.
        """
        return None

    @property
    def path_gate(self) -> nn.Module | None:
        """The projection that weighs two paths against each other, if there is one.

        Training gives it a learning rate of its own.
        """
        return None

    def flops_per_token(self, length: int) -> float:
        """Operations per token besides the linear projections, in sequences of `length` tokens."""
        return 0.0

    def probes(self) -> list[Probe]:
        """Statistics of the layer's memory to monitor in training, e.g. its time scales."""
        return []

    @classmethod
    def test_cases(cls) -> dict[str, dict[str, Any]]:
        """Small options to test the layer with, by a suffix for the test's name ("" for none)."""
        return {"": {}}

    def set_reach(self, size: int) -> None:
        """Change the window or chunk between calls, as a curriculum does.

        Raises:
            TypeError: if the layer has neither.
        """
        raise TypeError(f"{type(self).__name__} has no window or chunk whose size could be set")
