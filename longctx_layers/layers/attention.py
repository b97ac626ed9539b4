"""What attention layers add to `Layer`: projections, rotary embedding, cached keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx_layers.layers.base import Layer, StateT
from longctx_layers.layers.norms import HeadNorm
from longctx_layers.layers.rotary import RopeScaling, rotary_table, rotate
from longctx_layers.layers.state import Field
from longctx_layers.ops import FarKeys, Segments, sparse_attention
from longctx_layers.ops.checks import expect_number, expect_positive


@dataclass(frozen=True)
class Projection:
    """Makes a layer's attention projections fit those of a pretrained model.

    >>> from longctx_layers import CausalAttention
    >>> layer = CausalAttention(64, 4, projection=Projection(head_dim=32, bias=True))
    >>> layer.q_proj
    Linear(in_features=64, out_features=128, bias=True)

    Attributes:
        head_dim: size of a head, if it is not d_model / n_heads.
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
    """All keys and values so far; position and segment id of each row.

    Attributes:
        k, v: `[B, S, G, P]`, right-aligned, keys without rotary embedding; zeros where the row's
            segment has fewer.
        position: `[B]` int64, the position in its segment of the row's next token.
        segment: `[B]` int64, id of the row's segment; -1 before its first token.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    segment: Tensor


class AttentionLayer(Layer[StateT]):
    """Base of the layers with attention: `project`, `attend`, then `o_proj` on the heads.

    A subclass describes its cache in `fields` by `cache_fields`, and returns the new cache from
    `mix` by `cache_tail`.

    Raises:
        ValueError, TypeError: for sizes that do not fit each other.
    """

    input_projection = "k_proj"
    output_projection = "o_proj"

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
        super().__init__(d_model, dropout=dropout, device=device, dtype=dtype)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        projection = Projection() if projection is None else projection
        _check_heads(d_model, n_heads, n_kv_heads, projection)
        head_dim = d_model // n_heads if projection.head_dim is None else projection.head_dim
        _check_rotary(head_dim, rope_base, projection.rope_scaling)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.rope_base = rope_base
        self.projection = projection
        inner = n_heads * head_dim
        kv = n_kv_heads * head_dim
        self.q_proj = self.linear(d_model, inner, bias=projection.bias)
        self.k_proj = self.linear(d_model, kv, bias=projection.bias)
        self.v_proj = self.linear(d_model, kv, bias=projection.bias)
        self.o_proj = self.linear(inner, d_model, bias=projection.out_bias)
        self.q_norm = self.k_norm = None
        if projection.qk_norm:
            self.q_norm = HeadNorm(1, head_dim, **self.factory)
            self.k_norm = HeadNorm(1, head_dim, **self.factory)

    def extra_repr(self) -> str:
        """The layer's hyperparameters, in the style of torch's own modules."""
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

    def keys_per_query(self, length: int) -> float:
        """How many keys a query sees on average, in sequences of `length` tokens."""
        return (length + 1) / 2

    def flops_per_token(self, length: int) -> float:
        """Operations per token besides the linear projections: of scores and of values."""
        return 4 * self.n_heads * self.head_dim * self.keys_per_query(length)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """`[B, T, h * P]` to `[B, T, h, P]`."""
        return x.unflatten(-1, (count, self.head_dim))

    def project(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, P]`, and keys and values `[B, S, G, P]`, cached ones first."""
        q = self.heads(self.q_proj(x), self.n_heads)
        k = self.heads(self.k_proj(x), self.n_kv_heads)
        v = self.heads(self.v_proj(x), self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=1)
            v = torch.cat([state.v.to(v.dtype), v], dim=1)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        *,
        far: FarKeys | None = None,
        **sizes: Any,
    ) -> Tensor:
        """Rotate and attend: what `project` returned, to `[B, T, H, P]`.

        Args:
            q, k, v: from `project`.
            segments: of the queries, as for `mix`.
            far: keys outside the window or chunk, matched without rotary embedding.
            sizes: window_size, or chunk_size and chunk_shift, as for `sparse_attention`.
        """
        queries = q.transpose(1, 2)
        keys = k.transpose(1, 2)
        values = v.transpose(1, 2)
        if self.rope_base is not None:
            # Only distances matter: a key's angle counts from the first cached key.
            scaling = self.projection.rope_scaling
            cos, sin = rotary_table(k.shape[1], self.head_dim, self.rope_base, q, scaling)
            cached = k.shape[1] - q.shape[1]
            queries = rotate(queries, (cos[cached:], sin[cached:]))
            keys = rotate(keys, (cos, sin))
        y = sparse_attention(
            queries,
            keys,
            values,
            segments=segments,
            far=far,
            dropout_p=self.dropout if self.training else 0.0,
            **sizes,
        )
        return y.transpose(1, 2)

    def cache_fields(self, size: int | None) -> dict[str, Field]:
        """Fields of a cache of the last `size` keys and values; None: of all."""
        shape = (size, self.n_kv_heads, self.head_dim)
        return {"k": Field(shape), "v": Field(shape)}


def _check_heads(d_model: int, n_heads: int, n_kv_heads: int, projection: Projection) -> None:
    expect_positive("n_heads", n_heads)
    expect_positive("n_kv_heads", n_kv_heads)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"n_kv_heads: expected a divisor of n_heads = {n_heads}, got {n_kv_heads}; "
            "every key head serves the same number of query heads"
        )
    if projection.head_dim is not None:
        expect_positive("head_dim", projection.head_dim)
    elif d_model % n_heads:
        raise ValueError(
            f"n_heads: expected a divisor of d_model = {d_model}, got {n_heads}; change one of "
            "them, or pass projection=Projection(head_dim=...)"
        )


def _check_rotary(head_dim: int, rope_base: float | None, scaling: Any) -> None:
    if rope_base is not None and head_dim % 2:
        raise ValueError(
            f"head_dim: expected an even number for rotary embedding, got {head_dim}; change "
            "n_heads, or turn rotary embedding off with rope_base=None"
        )
    if rope_base is not None:
        expect_number("rope_base", rope_base)
        if not (math.isfinite(rope_base) and rope_base > 0):
            raise ValueError(f"rope_base: expected a number above 0 or None, got {rope_base}")
    if not isinstance(scaling, (RopeScaling, type(None))):
        raise TypeError(
            f"rope_scaling: expected a RopeScaling or None, got {scaling!r}; "
            "pass e.g. RopeScaling(factor=8.0, original_length=8192)"
        )
    if scaling is not None and rope_base is None:
        raise ValueError(
            "rope_scaling: expected None without rotary embedding (rope_base=None), got "
            f"{scaling!r}; leave it out, or pass a rope_base"
        )


# States that were saved when the class was defined in `base`.
torch.serialization.add_safe_globals([(KeyValueState, "longctx_layers.layers.base.KeyValueState")])
