"""Documents packed into rows of equal length; every token is used exactly once.

The documents of an epoch form one stream. `ids` are cut from it. `labels` are the next tokens,
ignored where the next token belongs to another document. `segment_ids` number the documents, and
are negative for padding, which only the end of the stream has.
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
    """The shape of a batch on this process, and the place of this process among all.

    Attributes:
        rows: of a batch on this process.
        length: tokens of a row.
        rank: the number of this process.
        world_size: how many processes there are.
    """

    rows: int
    length: int
    rank: int = 0
    world_size: int = 1

    @property
    def all_rows(self) -> int:
        """Rows of the batches of all processes together."""
        return self.rows * self.world_size


class Stream:
    """Documents of a store, in a chosen order, as one sequence that can be read from any position.

    Args:
        store: where the documents are.
        documents: `[n]` their numbers.
        first_segment: the segment id of the first document; the others follow.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, first_segment: int = 0) -> None:
        self.store = store
        self.documents = documents
        self.first_segment = first_segment
        self.ends = np.cumsum(store.lengths(documents))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and segment ids of the tokens from `start` to `stop`, or to the end."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        ids: list[np.ndarray] = []
        segments: list[np.ndarray] = []
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
    """Ids, labels and segment ids of one row, each `[length]`.

    Args:
        ids, segments: `[n]`; the row's tokens, and possibly one more for the last label.
        size: how many of the tokens belong to the row; the rest of it is padding.
        length: of the row.

    >>> row(np.array([7, 8, 9]), np.array([0, 0, 1]), size=3, length=4)["labels"].tolist()
    [8, -100, -100, -100]
    """
    padded = {
        "ids": np.zeros(length, np.int64),
        "labels": np.full(length, IGNORED_LABEL, np.int64),
        "segment_ids": np.full(length, PAD_SEGMENT, np.int64),
    }
    same_document = segments[1:] == segments[:-1]
    padded["ids"][:size] = ids[:size]
    padded["labels"][: len(same_document)] = np.where(same_document, ids[1:], IGNORED_LABEL)
    padded["segment_ids"][:size] = segments[:size]
    return {name: torch.from_numpy(values) for name, values in padded.items()}


def stack(rows: list[Batch]) -> Batch:
    """Stack B rows `[T]` into a batch `[B, T]`."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Epoch:
    """The batches of one pass over some documents of a store.

    Args:
        store: where the documents are.
        documents: `[n]` the numbers of those to pass over.
        shape: of the batches.
        number: of the epoch.
        seed: the order of documents and of rows is drawn from `(seed, number)`; without a seed
            everything stays in the store's order.
        carry_state: whether to cut the stream into as many lanes as there are rows, so that row b
            of a batch continues its lane where row b of the previous batch stopped.

    >>> from longctx_layers.data.store import in_memory
    >>> from longctx_layers.data.tokenizers import ByteTokenizer
    >>> store = in_memory(["abc", "de"], ByteTokenizer())
    >>> Epoch(store, np.arange(2), Shape(rows=1, length=4)).batch(1)["ids"].tolist()
    [[100, 101, 256, 0]]
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
    ) -> None:
        self.shape = shape
        draw = None if seed is None else np.random.default_rng([seed, number])
        if draw is not None:
            documents = draw.permutation(documents)
        # Epochs have different segment ids, so that none continues a state of the previous one.
        self.stream = Stream(store, documents, first_segment=number * len(documents))
        total = len(self.stream)
        if carry_state:
            lane = np.arange(shape.all_rows + 1) * total // shape.all_rows
            steps = -(-int(np.diff(lane).max()) // shape.length)
            self.starts: np.ndarray = (lane[:-1] + np.arange(steps)[:, None] * shape.length).ravel()
            self.stops = np.tile(lane[1:], steps)
        else:
            self.starts = np.arange(0, total, shape.length)
            if draw is not None:
                self.starts = draw.permutation(self.starts)
            self.stops = np.full(len(self.starts), total)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.shape.all_rows)

    def batch(self, index: int) -> Batch:
        """This process's part of batch `index`; missing rows of the last batch are padding."""
        rows, length, rank, _ = self.shape
        first = index * self.shape.all_rows + rank * rows
        return stack([self._row(number, length) for number in range(first, first + rows)])

    def _row(self, number: int, length: int) -> Batch:
        start = int(self.starts[number]) if number < len(self.starts) else 0
        stop = int(self.stops[number]) if number < len(self.starts) else 0
        size = max(0, min(length, stop - start))
        # One more token for the last label, even if it is the first token of another row or lane.
        ids, segments = self.stream.read(start, start + size + 1 if size else start)
        return row(ids, segments, size, length)
