"""Lanes of a stream: the documents dealt to each row of the batches, and their tokens."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from longctx_layers.data.keys import digest
from longctx_layers.data.packing import Batch, row
from longctx_layers.data.tokenizers import Tokenizer

# A block ends at whichever is reached first.
BLOCK_DOCUMENTS = 1024
BLOCK_CHARACTERS = 1 << 24


class Dealer:
    """Deals the documents of one epoch to lanes.

    Args:
        source: an iterable dataset with a column `text`.
        held_out: digests of documents to leave out.
        n_lanes: of all processes together.
        order: numbers that the order within a block is drawn from.
        anchor: where to start, from `anchors`; None for the first document.

    Attributes:
        anchors: starts of blocks, from which a `Dealer` can resume: the number of the block, the
            state of the source, and per lane the characters and documents dealt before.
    """

    def __init__(
        self,
        source: Any,
        held_out: Container[int],
        n_lanes: int,
        order: tuple[int, ...],
        anchor: dict[str, Any] | None = None,
    ) -> None:
        self.source = copy.deepcopy(source)  # it holds its own position
        self.held_out = held_out
        self.order = order
        start: dict[str, Any] = {
            "block": 0,
            "source": None,
            "characters": [0] * n_lanes,
            "documents": [0] * n_lanes,
        }
        self.anchors = deque([anchor or start])
        self.characters: list[int] = list(self.anchors[0]["characters"])
        self.documents: list[int] = list(self.anchors[0]["documents"])

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Yield `(lane, number, text)`: the text is document `number` of the lane."""
        block: int = self.anchors[0]["block"]
        self.source.load_state_dict(self.anchors[0]["source"])
        examples = iter(self.source)
        while texts := self._block(examples):
            after = self.source.state_dict()
            for place in np.random.default_rng([*self.order, block]).permutation(len(texts)):
                lane = self.characters.index(min(self.characters))
                number = self.documents[lane]
                self.documents[lane] += 1
                self.characters[lane] += len(texts[place])
                yield lane, number, texts[place]
            block += 1
            self.anchors.append(
                {
                    "block": block,
                    "source": after,
                    "characters": list(self.characters),
                    "documents": list(self.documents),
                }
            )

    def _block(self, examples: Iterator[dict[str, str]]) -> list[str]:
        texts: list[str] = []
        size = 0
        for example in examples:
            text = example["text"]
            if text and digest(text) not in self.held_out:
                texts.append(text)
                size += len(text)
                if len(texts) >= BLOCK_DOCUMENTS or size >= BLOCK_CHARACTERS:
                    break
        return texts


class Lane:
    """The tokens of one row, batch after batch.

    Args:
        done: documents before the first token to read.
        offset: the place of that token in its document.
        parity: of the segment ids: 0 or 1, different from the last epoch's, so that no state is
            carried over between epochs.
    """

    def __init__(self, done: int, offset: int, parity: int) -> None:
        self.done = done
        self.offset = offset
        self.parity = parity
        self.texts: deque[str] = deque()
        self.ready: deque[np.ndarray] = deque()  # ids of whole documents, also of the first one
        self.n_ready = 0  # tokens from `offset` on

    def add(self, number: int, text: str) -> None:
        """Add document `number` of the lane, unless it was read before."""
        if number >= self.done:
            self.texts.append(text)

    def tokenise(self, tokenizer: Tokenizer) -> None:
        """Turn the next text into ready tokens."""
        (ids,) = tokenizer.encode_batch([self.texts.popleft()])
        skipped = 0 if self.ready else self.offset
        self.ready.append(np.append(ids.astype(np.int64), tokenizer.end_of_text))
        self.n_ready += len(self.ready[-1]) - skipped

    def take(self, length: int) -> Batch:
        """Take a row of `length` tokens; if fewer are ready, the rest is padding."""
        ids: list[np.ndarray] = []
        segments: list[np.ndarray] = []
        missing = length + 1
        offset = self.offset
        for place, document in enumerate(self.ready):
            piece = document[offset : offset + missing]
            ids.append(piece)
            segments.append(np.full(len(piece), 2 * (self.done + place) + self.parity))
            missing -= len(piece)
            offset = 0
            if not missing:
                break
        size = min(length, self.n_ready)
        self._advance(size)
        nothing = np.empty(0, np.int64)
        return row(
            np.concatenate([nothing, *ids]), np.concatenate([nothing, *segments]), size, length
        )

    def _advance(self, size: int) -> None:
        self.n_ready -= size
        self.offset += size
        while self.ready and self.offset >= len(self.ready[0]):
            self.offset -= len(self.ready.popleft())
            self.done += 1
