"""What all layers share: projections, the call, its checks, and the cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_layers.layers.checks import (
    check_input,
    check_segment_ids,
    check_state,
)
from longctx_layers.layers.init import draw_linear, draw_own, mark_drawn
from longctx_layers.layers.parameters import (
    SpecialParameters,
    activation_dtype,
    device_of,
    weight_dtype,
    weight_of,
)
from longctx_layers.layers.pieces import by_rows, lengths, may_divide
from longctx_layers.layers.rotary import RopeScaling, rotary_table, rotate
from longctx_layers.layers.state import Field, Rows, arrange, tail, usable_in_training
from longctx_layers.ops import FarKeys, Segments, sparse_attention
from longctx_layers.ops.checks import expect_number, expect_positive
from longctx_layers.ops.gated_norms import head_norm


@dataclass(frozen=True)
class Projection:
    """Shapes of the attention projections that differ from the usual ones (pretrained models).

    Attributes:
        head_dim: size of a head, where it is not d_model / n_heads.
        bias: whether the q, k and v projections have biases.
        out_bias: whether the output projection has one.
        qk_norm: whether q and k pass an RMSNorm over head_dim with a learned scale.
        rope_scaling: how the wavelengths of the rotary embedding are stretched; None: not at all.
    """

    head_dim: int | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None


class KeyValueState(NamedTuple):
    """Cached keys and values; position and segment id of each row.

    Attributes:
        k, v: `[B, S, G, P]`, right-aligned, keys without rotary embedding; zeros where the row's
            segment has fewer.
        position: `[B]` int64, where in its segment the row's next token will stand.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    segment: Tensor


class HeadNorm(SpecialParameters):
    """RMSNorm of each head with a learned scale `[H, P]`: `[B, T, H, P]` to the same."""

    no_decay = ("weight",)

    def __init__(self, n_heads: int, head_dim: int, scale: float = 1.0, **factory: Any) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_heads, head_dim, **factory))

    def draw_own(self) -> None:
        """Set the scale to its first value."""
        nn.init.constant_(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight).to(x.dtype)


class AttentionLayer(SpecialParameters):
    """Base of all layers: `y, state = layer(x, state=None, *, segment_ids=None)`.

    A subclass sets `state_type`, describes its state in `fields`, and computes in `mix` what the
    output projection gets, with the new state. Its `__init__` ends with `reset_parameters`.

    On a CPU a large call is worked through in pieces that fit the caches: a few rows at a time,
    and a few tokens, each piece from the state that the one before left. Not where something could
    notice: see `may_divide`.

    Attributes:
        grain: tokens that a piece is a multiple of. None for layers whose state grows, so that
            every piece would copy it: they take a call as a whole, or cut it themselves.
        first_piece: tokens before the first multiple.
    """

    state_type: ClassVar[type[Any]] = KeyValueState
    grain: int | None = None
    first_piece: int = 0

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        rope_base: float | None = 10000.0,
        dropout: float = 0.0,
        projection: Projection | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        projection = Projection() if projection is None else projection
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            expect_positive(name, value)
        if n_heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads: expected a divisor of n_heads = {n_heads}, got {n_kv_heads}; "
                "every key head serves the same number of query heads"
            )
        if projection.head_dim is None and d_model % n_heads:
            raise ValueError(
                f"n_heads: expected a divisor of d_model = {d_model}, got {n_heads}; change one of "
                "them, or give Projection(head_dim=...)"
            )
        head_dim = d_model // n_heads if projection.head_dim is None else projection.head_dim
        expect_positive("head_dim", head_dim)
        if rope_base is not None and head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number for rotary embedding, got {head_dim}; change "
                "n_heads, or turn rotary embedding off with rope_base=None"
            )
        expect_number("dropout", dropout)
        if rope_base is not None:
            expect_number("rope_base", rope_base)
            if not (math.isfinite(rope_base) and rope_base > 0):
                raise ValueError(f"rope_base: expected a number above 0 or None, got {rope_base}")
        if not isinstance(projection.rope_scaling, (RopeScaling, type(None))):
            raise TypeError(
                f"rope_scaling: expected a RopeScaling or None, got {projection.rope_scaling!r}; "
                "pass e.g. RopeScaling(factor=8.0, original_length=8192)"
            )
        if projection.rope_scaling is not None and rope_base is None:
            raise ValueError(
                "rope_scaling: expected None without rotary embedding (rope_base=None), got "
                f"{projection.rope_scaling!r}; leave it out, or pass a rope_base"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim, self.rope_base, self.dropout = head_dim, rope_base, dropout
        self.projection = projection
        self.factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv = n_heads * head_dim, n_kv_heads * head_dim
        self.q_proj = self.linear(d_model, inner, bias=projection.bias)
        self.k_proj = self.linear(d_model, kv, bias=projection.bias)
        self.v_proj = self.linear(d_model, kv, bias=projection.bias)
        self.o_proj = self.linear(inner, d_model, bias=projection.out_bias)
        self.q_norm = self.k_norm = None
        if projection.qk_norm:
            self.q_norm = HeadNorm(1, head_dim, **self.factory)
            self.k_norm = HeadNorm(1, head_dim, **self.factory)

    def linear(
        self, inputs: int, outputs: int, bias: bool = False, scale: float = 1.0
    ) -> nn.Linear:
        """A projection with the layer's device and dtype; `scale` is what `draw_weight` takes."""
        linear = nn.Linear(inputs, outputs, bias=bias, **self.factory)
        linear.first_scale = scale  # type: ignore[assignment]
        return linear

    def reset_parameters(self) -> None:
        """Draw all parameters anew: projections by `draw_linear`, the rest by `draw_own`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw_linear(module)
            elif module is not self:
                draw_own(module)
        self.draw_own()
        mark_drawn(self)

    def draw_own(self) -> None:
        """Draw the parameters that the layer holds itself, which most layers have none of."""

    def fields(self) -> dict[str, Field]:
        """The tensors of this layer's state."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, state: Any, segments: Segments | None, offset: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the output projection gets, `[B, T, H * P]`, and the new state's tensors.

        Args:
            x: `[B, T, D]` with pads at the right of each row: a whole call, or a piece of it.
            state: the state before, or None where x begins everything.
            segments: of x; None for one segment without pads that began `offset` tokens before x.
            offset: the tokens of the call before x.
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Any = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Compute outputs and the state behind them; trains, prefills and decodes.

        Args:
            x: `[B, T, D]`, T >= 0, in the parameters' dtype (or any under autocast).
            state: what an earlier call returned, or `init_state`; never changed. None to begin.
            segment_ids: `[B, T]` integers. Tokens see only their own segment: a run of equal ids.
                Negative ids are pads: their outputs are 0, and nothing else notices them. None
                for one segment, which continues that of the state.

        Returns:
            y `[B, T, D]`, and the new state. NaN or infinity in a token may reach the whole row,
            and its state until a call begins another segment; never another row.

        Raises:
            ValueError, TypeError: for shapes, dtypes, devices or states that do not fit.
        """
        self._check(x, state, segment_ids)
        if state is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            state = usable_in_training(state)
        device = x.device.type
        # Autocast would round x in every projection; float64 it leaves alone.
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if x.shape[1] == 0:
            y = self.o_proj(x.new_zeros(len(x), 0, self.n_heads * self.head_dim))
            return y, self.init_state(len(x)) if state is None else state
        if (
            self.grain is None
            or device != "cpu"
            or torch.compiler.is_compiling()
            or not may_divide(self, x, dropout=self.dropout)
        ):
            return self._run(x, state, segment_ids)
        return by_rows(partial(self._run, grain=self.grain), x, state, segment_ids)

    def _run(
        self, x: Tensor, state: Any, segment_ids: Tensor | None, grain: int | None = None
    ) -> tuple[Tensor, Any]:
        rows: Rows = arrange(x, state, segment_ids)
        x, state = rows.pack(x), rows.restart(state)
        pieces: Sequence[Tensor] = [x]
        if grain is not None:
            pieces = x.split(lengths(len(x), x.shape[1], grain, self.first_piece), dim=1)
        offset, ys = 0, []
        for piece in pieces:
            segments, length = rows.segments, piece.shape[1]
            if segments is not None and len(pieces) > 1:
                segments = segments.part(offset, length)
            y, new = self.mix(piece, state, segments, offset)
            state = self.state_type(**new, position=rows.position, segment=rows.segment)
            ys.append(F.dropout(self.o_proj(y), self.dropout, self.training))
            offset += length
        return rows.unpack(ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)), state

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Any:
        """The empty state of a batch, on the parameters' device unless another is given."""
        dtype = self._dtype
        where = device_of(self.k_proj, self) if device is None else device
        tensors = {
            name: torch.zeros(
                batch_size,
                *(0 if n is None else n for n in field.shape),
                dtype=field.dtype(dtype),
                device=where,
            )
            for name, field in self._all_fields().items()
        }
        return self.state_type(**{**tensors, "segment": tensors["segment"] - 1})

    def state_size(self, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens."""
        dtype = self._dtype
        return sum(
            math.prod(length if n is None else n for n in field.shape) * field.dtype(dtype).itemsize
            for field in self._all_fields().values()
        )

    def extra_repr(self) -> str:
        """The layer's hyperparameters, as torch's own modules show theirs."""
        shown: dict[str, Any] = {"d_model": self.d_model, "n_heads": self.n_heads}
        if self.n_kv_heads != self.n_heads:
            shown["n_kv_heads"] = self.n_kv_heads
        if self.rope_base != 10000.0:
            shown["rope_base"] = self.rope_base
        if self.dropout:
            shown["dropout"] = self.dropout
        if self.projection != Projection():
            shown["projection"] = self.projection
        shown |= self.options()
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def options(self) -> dict[str, Any]:
        """The subclass's own hyperparameters, for `repr`."""
        return {}

    def _check(self, x: Tensor, state: Any, segment_ids: Tensor | None) -> None:
        name = type(self).__name__
        check_input(name, x, self.d_model, weight_of(self.k_proj))
        if segment_ids is not None:
            check_segment_ids(name, segment_ids, x)
        if state is not None:
            check_state(name, state, self.state_type, self._all_fields(), x, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """That of activations: of the first weight that is not quantised."""
        return weight_dtype(self.k_proj) or activation_dtype(self)

    def _all_fields(self) -> dict[str, Field]:
        return {**self.fields(), "position": Field((), "index"), "segment": Field((), "index")}

    def heads(self, x: Tensor, count: int) -> Tensor:
        """`[B, T, h * P]` to `[B, T, h, P]`."""
        return x.unflatten(-1, (count, self.head_dim))

    def attend(
        self,
        x: Tensor,
        state: Any,
        segments: Segments | None,
        *,
        window_size: int | None = None,
        chunk_size: int | None = None,
        chunk_shift: int = 0,
        far: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, rotate and attend.

        Args:
            far: called with un-rotated q `[B, H, T, P]`, k and v `[B, G, S, P]`; returns FarKeys.

        Returns:
            The attention output `[B, T, H, P]`, and all keys and values `[B, S, G, P]`, cached
            ones first, for the state.
        """
        q, k, v = self.project(x, state)
        sizes = {"window_size": window_size, "chunk_size": chunk_size, "chunk_shift": chunk_shift}
        return self.attend_to(q, k, v, segments, far=far, **sizes), k, v

    def project(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, P]`, and keys and values `[B, S, G, P]`, cached ones first."""
        q = self.heads(self.q_proj(x), self.n_heads)
        k = self.heads(self.k_proj(x), self.n_kv_heads)
        v = self.heads(self.v_proj(x), self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        return q, k, v

    def attend_to(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        *,
        far: Any = None,
        **sizes: Any,
    ) -> Tensor:
        """Rotate and attend: what `project` returns, to `[B, T, H, P]`.

        Args:
            far: as for `attend`.
            sizes: of the window or chunk, as for `sparse_attention`.
        """
        far_keys: FarKeys | None = None
        queries, keys, values = (z.transpose(1, 2) for z in (q, k, v))
        if far is not None:
            far_keys = far(queries, keys, values)
        if self.rope_base is not None:
            # Only distances matter: a key's angle counts from the first cached key.
            scaling = self.projection.rope_scaling
            cos, sin = rotary_table(k.shape[1], self.head_dim, self.rope_base, q, scaling)
            skip = k.shape[1] - q.shape[1]
            queries, keys = rotate(queries, (cos[skip:], sin[skip:])), rotate(keys, (cos, sin))
        y = sparse_attention(
            queries,
            keys,
            values,
            segments=segments,
            far=far_keys,
            dropout_p=self.dropout if self.training else 0.0,
            **sizes,
        )
        return y.transpose(1, 2)

    def cache_fields(self, size: int | None) -> dict[str, Field]:
        """Fields of a cache of the last `size` keys and values; None: of all."""
        shape = (size, self.n_kv_heads, self.head_dim)
        return {"k": Field(shape), "v": Field(shape)}

    def cache(
        self,
        k: Tensor,
        v: Tensor,
        size: int,
        segments: Segments | None,
        first: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The last `size` keys and values of each row: see `tail`."""
        return {"k": tail(k, size, segments, first), "v": tail(v, size, segments, first)}
