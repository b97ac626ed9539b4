"""The protocol of all layers: one call for training, prefill and decoding, with explicit state."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.layers import splitting
from longctx_layers.layers.checks import check_input, check_segment_ids, check_state
from longctx_layers.layers.description import SelfDescription
from longctx_layers.layers.init import draw_linear, draw_own, mark_drawn
from longctx_layers.layers.parameters import (
    activation_dtype,
    device_of,
    weight_dtype,
)
from longctx_layers.layers.plain_modules import works_by_token
from longctx_layers.layers.splitting import by_rows, split_lengths
from longctx_layers.layers.state import Field, arrange, usable_in_training
from longctx_layers.ops import Segments
from longctx_layers.ops.checks import expect_number, expect_positive

StateT = TypeVar("StateT", bound=tuple[Any, ...])


class Layer(SelfDescription, Generic[StateT]):
    """Base of all layers: `y, state = layer(x, state=None, *, segment_ids=None)`.

    To write a layer, set `state_type`, describe the state's tensors in `fields`, and compute in
    `mix`. Everything else follows: streaming, packed and padded rows, checks, and splitting of
    large calls. `__init__` takes `d_model, n_heads` and keyword options, and ends with
    `reset_parameters()`. `register_layer` makes the layer known by a name.

    >>> from longctx_layers import build_layer
    >>> layer = build_layer("dpassm", 64, 4, window_size=16)
    >>> y, state = layer(torch.randn(1, 100, 64))
    >>> y, state = layer(torch.randn(1, 1, 64), state)  # the next token

    Attributes:
        state_type: a NamedTuple with the tensors of `fields`, then `position` and `segment`.
        input_projection: name of a projection that x passes. Its weight tells which dtype and
            device x and the state must have; None if the layer has no such projection.
    """

    state_type: ClassVar[type[Any]]
    input_projection: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "state_type" in vars(cls):
            # States are plain tensors: torch.load(..., weights_only=True) may build them.
            torch.serialization.add_safe_globals([cls.state_type])

    def __init__(
        self,
        d_model: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_positive("d_model", d_model)
        expect_number("dropout", dropout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.d_model = d_model
        self.dropout = dropout
        self.factory: dict[str, Any] = {"device": device, "dtype": dtype}

    # ---- What a layer defines

    def fields(self) -> dict[str, Field]:
        """The tensors of this layer's state, without `position` and `segment`."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, state: StateT | None, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute outputs `[B, T, d_model]` before dropout, and the tensors of the new state.

        Args:
            x: `[B, T, d_model]` with padding at the right of each row: a whole call, or a part.
            state: the state before x, or None if x is the beginning.
            segments: of x; None for one segment without padding that began `offset` tokens
                before x.
            offset: how many tokens of the call come before x.
        """
        raise NotImplementedError

    def draw_own(self) -> None:
        """Initialise the parameters that the layer itself holds; most layers have none."""

    def options(self) -> dict[str, Any]:
        """The layer's own hyperparameters, for `repr`."""
        return {}

    # ---- What a layer may say of itself; further properties are in `SelfDescription`

    @property
    def split_multiple(self) -> int | None:
        """On a CPU, large calls run in parts of a multiple of this many tokens.

        None disables that: if the state grows, each part would copy it.
        """
        return None

    @property
    def first_split(self) -> int:
        """Tokens of an additional first part, before the multiples."""
        return 0

    @property
    def constant_state(self) -> bool:
        """Whether the state's size is independent of the length."""
        return all(None not in field.shape for field in self.fields().values())

    # ---- What every layer has

    def linear(
        self, inputs: int, outputs: int, bias: bool = False, scale: float = 1.0
    ) -> nn.Linear:
        """A projection with the layer's device and dtype; for `scale` see `draw_weight`."""
        linear = nn.Linear(inputs, outputs, bias=bias, **self.factory)
        linear.first_scale = scale  # type: ignore[assignment]
        return linear

    def reset_parameters(self) -> None:
        """Initialise all parameters: projections by `draw_linear`, the others by `draw_own`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw_linear(module)
            elif module is not self:
                draw_own(module)
        self.draw_own()
        mark_drawn(self)

    def forward(
        self, x: Tensor, state: StateT | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, StateT]:
        """Compute outputs and the state after them, in training, prefill and decoding alike.

        Args:
            x: `[B, T, d_model]`, T >= 0, in the parameters' dtype (any dtype under autocast).
            state: what an earlier call or `init_state` returned; it is never changed. None to
                begin.
            segment_ids: `[B, T]` integers. Tokens see only their own segment, a run of equal ids.
                Negative ids are padding: their outputs are 0, and other tokens do not see them.
                None for a single segment, which continues that of the state.

        Returns:
            y `[B, T, d_model]`, and the new state. NaN or infinity in a token may reach all of its
            row, and the row's state until another segment begins; never another row.

        Raises:
            ValueError, TypeError: for shapes, dtypes, devices or states that do not fit.
        """
        self._check(x, state, segment_ids)
        if state is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            state = usable_in_training(state)
        device = x.device.type
        # Autocast would round x in every projection; it leaves float64 alone.
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if x.shape[1] == 0:
            return x.clone(), self.init_state(len(x)) if state is None else state
        n_tokens = x.shape[0] * x.shape[1]
        if device != "cpu" or torch.compiler.is_compiling() or n_tokens <= splitting.TOKENS_AT_ONCE:
            return self._run(x, state, segment_ids)
        multiple = self.split_multiple
        # Dropout would draw its random numbers in another order.
        random = self.training and self.dropout > 0
        if multiple is None or random or not works_by_token(*self.children()):
            return self._run(x, state, segment_ids)
        return by_rows(partial(self._run, multiple=multiple), x, state, segment_ids)

    def _run(
        self,
        x: Tensor,
        state: StateT | None,
        segment_ids: Tensor | None,
        multiple: int | None = None,
    ) -> tuple[Tensor, StateT]:
        rows = arrange(x, state, segment_ids)
        x = rows.pack(x)
        state = rows.restart(state)
        parts: Sequence[Tensor] = [x]
        if multiple is not None:
            sizes = split_lengths(len(x), x.shape[1], multiple, self.first_split)
            parts = x.split(sizes, dim=1)
        offset = 0
        ys = []
        for part in parts:
            segments = rows.segments
            if segments is not None and len(parts) > 1:
                segments = segments.part(offset, part.shape[1])
            y, tensors = self.mix(part, state, segments, offset)
            state = self.state_type(**tensors, position=rows.position, segment=rows.segment)
            ys.append(F.dropout(y, self.dropout, self.training))
            offset += part.shape[1]
        assert state is not None
        return rows.unpack(ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)), state

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> StateT:
        """The empty state of a batch, on the parameters' device unless another one is given."""
        dtype = self._dtype
        where = self._device() if device is None else device
        tensors = {
            name: torch.zeros(
                batch_size,
                *(0 if n is None else n for n in field.shape),
                dtype=field.dtype(dtype),
                device=where,
            )
            for name, field in self._all_fields().items()
        }
        state: StateT = self.state_type(**{**tensors, "segment": tensors["segment"] - 1})
        return state

    def state_size(self, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens."""
        dtype = self._dtype
        return sum(
            math.prod(length if n is None else n for n in field.shape) * field.dtype(dtype).itemsize
            for field in self._all_fields().values()
        )

    def extra_repr(self) -> str:
        """The layer's hyperparameters, in the style of torch's own modules."""
        shown = {"d_model": self.d_model, **self.options()}
        if self.dropout:
            shown["dropout"] = self.dropout
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _check(self, x: Tensor, state: StateT | None, segment_ids: Tensor | None) -> None:
        name = type(self).__name__
        check_input(name, x, self.d_model, self._input_projection())
        if segment_ids is not None:
            check_segment_ids(name, segment_ids, x)
        if state is not None:
            check_state(name, state, self.state_type, self._all_fields(), x, self._dtype)

    def _input_projection(self) -> nn.Module | None:
        return None if self.input_projection is None else getattr(self, self.input_projection)

    @property
    def _dtype(self) -> torch.dtype:
        """That of activations: of the first weight that is not quantised."""
        projection = self._input_projection()
        dtype = None if projection is None else weight_dtype(projection)
        return activation_dtype(self) if dtype is None else dtype

    def _device(self) -> torch.device:
        projection = self._input_projection()
        return device_of(self) if projection is None else device_of(projection, self)

    def _all_fields(self) -> dict[str, Field]:
        return {**self.fields(), "position": Field((), "index"), "segment": Field((), "index")}


def __getattr__(name: str) -> Any:
    # Modules and states that were pickled when these classes were defined here.
    moved = {
        "AttentionLayer": "attention",
        "KeyValueState": "attention",
        "Projection": "attention",
        "HeadNorm": "norms",
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"longctx_layers.layers.{moved[name]}"), name)
