"""Tiles worth timing on a GPU, and how to make the kernels use them.

Beside the library's own row they are those that a cycle model of the code compiled for Hopper
liked; README.md says what it predicts.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from longctx_layers.kernels import attention_backward, attention_forward, ssd_configs
from longctx_layers.kernels.target import pick, target

Numbers = tuple[int, ...]

# Attention, by head_dim: rows, keys, num_warps, num_stages (attention_forward.Tiles).
FORWARD: dict[int, list[Numbers]] = {
    64: [
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 128, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 4, 2),
    ],
    128: [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ],
}
QUERIES: dict[int, list[Numbers]] = {
    64: [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3)],
    128: [(64, 64, 4, 2), (64, 32, 4, 3)],
}
KEYS: dict[int, list[Numbers]] = {
    64: [(64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)],
    128: [(32, 64, 4, 2), (64, 64, 4, 2)],
}
# The state space, by N: tokens, span, elements, num_warps, read_warps (ssd_configs.Tiles).
SSD: dict[int, list[Numbers]] = {
    64: [
        (64, 8, 4096, 4, 4),
        (64, 4, 4096, 4, 4),
        (64, 16, 4096, 4, 4),
        (64, 8, 4096, 8, 4),
        (128, 8, 4096, 8, 8),
    ],
    128: [
        (64, 8, 8192, 4, 4),
        (64, 4, 8192, 4, 4),
        (64, 8, 8192, 8, 8),
        (64, 8, 4096, 4, 4),
    ],
}
CANDIDATES = {"ssd": SSD, "forward": FORWARD, "queries": QUERIES, "keys": KEYS}

TABLES: dict[str, dict[str, Any]] = {
    "ssd": ssd_configs.CONFIGS,
    "forward": attention_forward.FORWARD,
    "queries": attention_backward.QUERIES,
    "keys": attention_backward.KEYS,
}
LARGEST_ERROR = 2e-2  # relative, between tiles: they add bfloat16 in another order


class Candidate(NamedTuple):
    """Tiles of one kernel (`kind`, a key of CANDIDATES) for one head_dim, or N for "ssd"."""

    kind: str
    size: int
    tiles: Numbers


def candidates(head_dims: Sequence[int] = (64, 128)) -> list[Candidate]:
    """All of them: the library's own, then the most promising of each kernel, and so on.

    The order lets a sweep be cut short.

    Args:
        head_dims: of attention; the state space is swept for every N.
    """
    by_kernel = []
    for kind, table in CANDIDATES.items():
        for size, others in table.items():
            if kind == "ssd" or size in head_dims:
                tiles = dict.fromkeys([own_tiles(kind, size), *others])
                by_kernel.append([Candidate(kind, size, one) for one in tiles])
    return [one for turn in zip_longest(*by_kernel) for one in turn if one is not None]


def own_tiles(kind: str, size: int) -> Numbers:
    """What the library uses on this GPU."""
    row = getattr(pick(TABLES[kind]), _field(size))
    return tuple(row)[:-1] if kind == "ssd" else tuple(row)  # the last one is for AMD's


def use(candidate: Candidate) -> None:
    """Make the kernels use these tiles from now on, in this process and on this GPU."""
    table = TABLES[candidate.kind]
    make = ssd_configs.Tiles if candidate.kind == "ssd" else attention_forward.Tiles
    table[target()] = pick(table)._replace(**{_field(candidate.size): make(*candidate.tiles)})


def winners(rows: Sequence[dict[str, Any]]) -> list[Candidate]:
    """The fastest candidate of each kernel and size, among those right on every shape.

    Args:
        rows: what `sweep.py` wrote: kind, size, tiles, shape, ms (None if it did not run), error.
    """
    shapes: dict[tuple[str, int], set[str]] = defaultdict(set)
    times: dict[Candidate, dict[str, float]] = defaultdict(dict)
    for row in rows:
        shapes[row["kind"], row["size"]].add(row["shape"])
        if row["ms"] is not None and row["error"] < LARGEST_ERROR:
            candidate = Candidate(row["kind"], row["size"], tuple(row["tiles"]))
            times[candidate][row["shape"]] = row["ms"]
    best: dict[tuple[str, int], tuple[float, Candidate]] = {}
    for candidate, by_shape in times.items():
        key = candidate.kind, candidate.size
        total = sum(by_shape.values())
        if set(by_shape) == shapes[key] and total < best.get(key, (math.inf, candidate))[0]:
            best[key] = total, candidate
    return [candidate for _, candidate in best.values()]


def use_winners(path: Path | None) -> None:
    """Use what a sweep found fastest; without its file, the library's own rows."""
    if path is None or not path.exists():
        print("tiles: the library's own rows, as there is no sweep to read")
        return
    for candidate in winners(json.loads(path.read_text())):
        print("tiles:", candidate.kind, candidate.size, candidate.tiles)
        use(candidate)


def _field(size: int) -> str:
    return "upto_64" if size <= 64 else "upto_128"
