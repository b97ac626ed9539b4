"""Documents packed into rows of equal length, every token once.

The documents of an epoch form one stream. `ids` are cut from it; `labels` are the next tokens,
ignored where the next token is another document's; `segment_ids` number the documents, and are
negative for pads, which only the end of the stream has.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longctx_layers.data.store import TokenStore

IGNORED_LABEL = -100
PAD_SEGMENT = -1

Batch = dict[str, Tensor]


class Shape(NamedTuple):
    """Of a batch on this process, and its place in that of all processes."""

    rows: int
    length: int
    rank: int = 0
    world_size: int = 1

    @property
    def all_rows(self) -> int:
        """Rows of the batches of all processes together."""
        return self.rows * self.world_size


class Stream:
    """Documents of a store in a given order, to be read from any place.

    Args:
        store: where the documents are.
        documents: `[n]` their numbers.
        first_segment: the segment id of the first one; the next have the next ids.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, first_segment: int = 0):
        self.store, self.documents, self.first_segment = store, documents, first_segment
        self.ends = np.cumsum(store.lengths(documents))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and segment ids of the tokens from `start` to `stop`, or to the end."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        ids, segments = [], []
        while start < min(stop, len(self)):
            document = self.store.document(self.documents[first])
            begin = start - (self.ends[first] - len(document))
            piece = document[begin : begin + stop - start]
            ids.append(piece.astype(np.int64))
            segments.append(np.full(len(piece), self.first_segment + first))
            start += len(piece)
            first += 1
        if not ids:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(ids), np.concatenate(segments)


def row(ids: np.ndarray, segments: np.ndarray, size: int, length: int) -> Batch:
    """`[length]` ids, labels and segment ids of a row.

    Args:
        ids, segments: `[n]`; the row's tokens, and possibly one more for the last one's label.
        size: how many of the tokens are the row's; pads follow them.
    """
    padded = {
        "ids": np.zeros(length, np.int64),
        "labels": np.full(length, IGNORED_LABEL, np.int64),
        "segment_ids": np.full(length, PAD_SEGMENT, np.int64),
    }
    goes_on = segments[1:] == segments[:-1]
    padded["ids"][:size] = ids[:size]
    padded["labels"][: len(goes_on)] = np.where(goes_on, ids[1:], IGNORED_LABEL)
    padded["segment_ids"][:size] = segments[:size]
    return {name: torch.from_numpy(values) for name, values in padded.items()}


def stack(rows: list[Batch]) -> Batch:
    """`[B, T]` from B rows."""
    return {name: torch.stack([one[name] for one in rows]) for name in rows[0]}


class Epoch:
    """The batches of one pass over some documents of a store.

    The order of documents and of rows is drawn from `(seed, number)`; without a seed everything
    stays in the store's order. With `carry_state` the stream is cut into as many lanes as there
    are rows, and row b of a batch goes on in its lane where row b of the one before stopped.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray,
        shape: Shape,
        *,
        number: int = 0,
        seed: int | None = None,
        carry_state: bool = False,
    ):
        self.shape = shape
        draw = None if seed is None else np.random.default_rng([seed, number])
        if draw is not None:
            documents = draw.permutation(documents)
        # No epoch repeats the ids of another: a state from the last one is never gone on with.
        self.stream = Stream(store, documents, first_segment=number * len(documents))
        total = len(self.stream)
        if carry_state:
            lane = np.arange(shape.all_rows + 1) * total // shape.all_rows
            steps = -(-int(np.diff(lane).max()) // shape.length)
            self.starts = (lane[:-1] + np.arange(steps)[:, None] * shape.length).ravel()
            self.stops = np.tile(lane[1:], steps)
        else:
            self.starts = np.arange(0, total, shape.length)
            if draw is not None:
                self.starts = draw.permutation(self.starts)
            self.stops = np.full(len(self.starts), total)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.shape.all_rows)

    def batch(self, index: int) -> Batch:
        """This process's part of batch `index`; rows that the last one lacks are all pads."""
        rows, length, rank, _ = self.shape
        first = index * self.shape.all_rows + rank * rows
        return stack([self._row(number, length) for number in range(first, first + rows)])

    def _row(self, number: int, length: int) -> Batch:
        start = int(self.starts[number]) if number < len(self.starts) else 0
        stop = int(self.stops[number]) if number < len(self.starts) else 0
        size = max(0, min(length, stop - start))
        # One token more, for the last label: also where another row or lane begins with it.
        ids, segments = self.stream.read(start, start + size + 1 if size else start)
        return row(ids, segments, size, length)
