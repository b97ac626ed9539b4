"""Large calls on a CPU in pieces that fit its caches: a few rows, and a few tokens, at a time."""

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
    few = TOKENS_AT_ONCE // x.shape[1] or 1
    if len(x) <= few:
        return call(x, state, segment_ids)
    calls = []
    for first in range(0, len(x), few):
        rows = slice(first, first + few)
        before = None if state is None else map_state(operator.itemgetter(rows), state)
        calls.append(call(x[rows], before, None if segment_ids is None else segment_ids[rows]))
    ys, states = zip(*calls, strict=True)
    return torch.cat(ys), type(states[0])(*map(torch.cat, zip(*states, strict=True)))


def lengths(batch: int, length: int, grain: int, first: int) -> list[int]:
    """Lengths of pieces of a call: multiples of `grain` but for the last.

    One of `first` tokens stands before them. What makes no two pieces stays whole.
    """
    size = grain * max(1, TOKENS_AT_ONCE // (max(1, batch) * grain))
    if length < first + 2 * size:
        return [length]
    *begins, last = range(first, length, size)
    return [first] * (first > 0) + [size] * len(begins) + [length - last]
