"""Splits large calls on a CPU into parts that fit its caches: a few rows and tokens at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx_layers.layers.state import map_state

TOKENS_AT_ONCE = 2048


def by_rows(
    call: Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]],
    x: Tensor,
    state: Any,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Any]:
    """`call(x, state, segment_ids)`, a few rows at a time: rows never depend on each other."""
    n_rows = TOKENS_AT_ONCE // x.shape[1] or 1
    if len(x) <= n_rows:
        return call(x, state, segment_ids)
    results = []
    for first in range(0, len(x), n_rows):
        rows = slice(first, first + n_rows)
        before = None if state is None else map_state(operator.itemgetter(rows), state)
        results.append(call(x[rows], before, None if segment_ids is None else segment_ids[rows]))
    ys, states = zip(*results, strict=True)
    return torch.cat(ys), type(states[0])(*map(torch.cat, zip(*states, strict=True)))


def split_lengths(batch: int, length: int, multiple: int, first: int) -> list[int]:
    """Split `length` tokens of `batch` rows into parts that fit the caches together.

    An optional first part of `first` tokens, then parts of a multiple of `multiple` tokens, then
    the rest. A call that is too short for two full parts stays whole.

    >>> split_lengths(batch=16, length=600, multiple=128, first=0)
    [128, 128, 128, 128, 88]
    """
    size = multiple * max(1, TOKENS_AT_ONCE // (max(1, batch) * multiple))
    if length < first + 2 * size:
        return [length]
    *begins, last = range(first, length, size)
    return [first] * (first > 0) + [size] * len(begins) + [length - last]
