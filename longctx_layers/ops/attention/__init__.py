"""Sparse causal attention: each query sees a contiguous range of near keys and a few far ones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longctx_layers.ops import availability, reference
from longctx_layers.ops.attention import blocked, cpu, flash, flex
from longctx_layers.ops.attention.far import FarKeys
from longctx_layers.ops.attention.pattern import Pattern
from longctx_layers.ops.checks import expect_dtype, expect_float, expect_positive, expect_shape
from longctx_layers.ops.examples import Draw
from longctx_layers.ops.operation import Operation
from longctx_layers.ops.segments import Segments


def _example(
    draw: Draw, prefix: int = 0, n_far_keys: int = 0, packed: bool = False, **sizes: int
) -> dict[str, Any]:
    length = draw.length
    arguments: dict[str, Any] = {"q": draw(2, 4, length, 64), **sizes}
    arguments["k"] = draw(2, 2, prefix + length, 64)
    arguments["v"] = draw(2, 2, prefix + length, 64)
    if packed:
        arguments["segments"] = draw.segments()
    if n_far_keys:
        lists = -(-length // 64)
        mask = draw(2, 1, length, n_far_keys) > 0
        k = draw(2, 2, lists, n_far_keys, 64)
        v = draw(2, 2, lists, n_far_keys, 64)
        arguments["far"] = FarKeys(draw(2, 4, length, 64), k, v, mask, block=64)
    return arguments


_operation = Operation(
    "sparse_attention",
    examples={
        "full": _example,
        "window, prefix": partial(_example, prefix=40, window_size=40),
        "window, packed": partial(_example, packed=True, window_size=40),
        "window, far keys": partial(_example, n_far_keys=3, window_size=40),
        "chunks": partial(_example, chunk_size=32),
        "one token": lambda draw: _example(Draw(1), prefix=8 * draw.length),
    },
    token_dim=2,
)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None = None,
    chunk_size: int | None = None,
    chunk_shift: int = 0,
    segments: Segments | None = None,
    far: FarKeys | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention over a window, a chunk or the whole segment, and a few far keys.

    Query i sees one contiguous range of keys, which ends at its own. The range begins at the first
    token of the query's segment, or later: at `i - window_size + 1` with a window (which includes
    the query's own key), and at the first token of the query's chunk with chunks; the chunk of
    position p of a segment is `floor((p - chunk_shift) / chunk_size)`. One softmax runs over the
    range and the far keys.

    Args:
        q: queries `[B, H, T, P]`.
        k, v: keys and values `[B, G, S, P]`, where G divides H (grouped queries: query head h
            reads key head `h // (H / G)`). The last T belong to the queries; the S - T before them
            are cached from earlier calls. With a window or chunks of W keys, W - 1 of them suffice.
        window_size: number of keys in the window, at least 1.
        chunk_size: number of tokens in a chunk, at least 1.
        chunk_shift: where the first whole chunk begins, `0 <= chunk_shift < chunk_size`.
        segments: where segments begin and rows end; None for one segment of T real tokens, which
            all cached keys belong to. Chunks then count from the call's first token.
        far: keys outside the range (global, random, memory). Its mask must leave out keys that are
            inside the range, which would count twice.
        dropout_p: probability with which attention weights are dropped.
        scale: factor on the scores, `P ** -0.5` by default.
        backend: see `longctx_layers.explain`.

    Returns:
        `[B, H, T, P]` in q's dtype. Softmax runs in float32 at least.

    Raises:
        ValueError, TypeError: for shapes, dtypes or sizes that do not fit.

    Source: Beltagy et al., Longformer, arXiv 2004.05150; Zaheer et al., BigBird, 2007.14062.

    >>> import torch
    >>> q = torch.randn(1, 4, 10, 16)
    >>> k, v = torch.randn(2, 1, 2, 10, 16)
    >>> sparse_attention(q, k, v, window_size=3).shape
    torch.Size([1, 4, 10, 16])
    """
    pattern = Pattern(window_size, chunk_size, chunk_shift, segments)
    _check(q, k, v, pattern, far, dropout_p)
    result: Tensor = _operation(
        q,
        k,
        v,
        pattern,
        far=far,
        dropout_p=dropout_p,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        backend=backend,
    )
    return result


def _check(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, far: FarKeys | None, dropout_p: float
) -> None:
    window_size, chunk_size, chunk_shift, segments = pattern
    expect_float("q", q, "[B, H, T, P]")
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, P], got a tensor of shape {list(q.shape)}")
    batch, heads, length, dim = q.shape
    expect_shape("k", k, (batch, None, None, dim), "[B, G, S, P]")
    expect_shape("v", v, tuple(k.shape), "[B, G, S, P], as k")
    expect_dtype("k", k, q.dtype)
    expect_dtype("v", v, q.dtype)
    if heads % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}; "
            "repeat or regroup the heads"
        )
    if k.shape[2] < length:
        raise ValueError(
            f"k: expected at least the {length} keys of the queries themselves, got {k.shape[2]}; "
            "concatenate cached keys before them"
        )
    for name, value in (("window_size", window_size), ("chunk_size", chunk_size)):
        if value is not None:
            expect_positive(name, value)
    if chunk_shift and not (chunk_size is not None and 0 <= chunk_shift < chunk_size):
        raise ValueError(
            f"chunk_shift: expected 0 <= chunk_shift < chunk_size ({chunk_size}), got {chunk_shift}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if segments is not None:
        expect_shape("segments.start", segments.start, (batch, length), "[B, T]")
        expect_shape("segments.length", segments.length, (batch,), "[B]")
    if far is not None:
        expect_positive("far.block", far.block)
        lists = -(-length // far.block)
        if lists > 1 and window_size is None and chunk_size is None:
            raise ValueError(
                f"far: expected one list of far keys for full attention, got {lists}; "
                "lists for blocks of queries need a window or a chunk"
            )
        expect_shape("far.q", far.q, tuple(q.shape), "[B, H, T, P], as q")
        expect_shape("far.k", far.k, (batch, k.shape[1], lists, None, dim), "[B, G, L, F, P]")
        expect_shape("far.v", far.v, tuple(far.k.shape), "[B, G, L, F, P], as far.k")
        expect_shape("far.mask", far.mask, (None, None, length, far.k.shape[3]), "[B, G, T, F]")
        sizes = far.mask.shape
        for size, whole, name in ((sizes[0], batch, "B"), (sizes[1], k.shape[1], "G")):
            if size not in (1, whole):
                raise ValueError(
                    f"far.mask: expected [B or 1, G or 1, T, F] with {name} = {whole}, got "
                    f"{list(far.mask.shape)}"
                )
        expect_dtype("far.mask", far.mask, torch.bool)
        for name, x in (("far.q", far.q), ("far.k", far.k), ("far.v", far.v)):
            expect_dtype(name, x, q.dtype)


def _refuse_triton(q: Tensor, *_: Any, dropout_p: float, scale: float, **__: Any) -> str | None:
    if (reason := availability.refuse_triton(q)) is not None:
        return reason
    limit = 256 if q.dtype.itemsize == 2 else 128
    if q.shape[-1] > limit:
        return f"takes head_dim up to {limit} in {q.dtype}, got {q.shape[-1]}"
    if dropout_p > 0:
        return f"drops no attention weights, got dropout_p = {dropout_p}"
    if scale <= 0:
        return f"needs a scale above 0, got {scale}"
    return None


@_operation.register("triton", refuse=_refuse_triton)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    far: FarKeys | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    from longctx_layers.kernels.attention import sparse_attention as kernel  # imports Triton

    first = pattern.first_key(q.shape[2], k.shape[2] - q.shape[2], q.device)
    first = first.to(torch.int32).contiguous()
    *far_tensors, block = (None, None, None, None, 0) if far is None else far
    y: Tensor = kernel(q, k, v, first, *far_tensors, block, scale)[0]
    return y


_operation.register("flash", refuse=flash.refuse)(flash.run)
_operation.register("flex", refuse=flex.refuse, reserve=flex.reserve)(flex.run)
_operation.register("cpu", refuse=cpu.refuse)(cpu.run)
_operation.register("torch")(blocked.run)
_operation.register("reference")(reference.sparse_attention)
