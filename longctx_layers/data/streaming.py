"""Packed batches from a stream of documents that is tokenised while it is read.

The stream is dealt to lanes, one for each row of the batches of all processes: a document goes to
the lane with the least text so far. Row b of a batch goes on in its lane where row b of the one
before stopped. Who reads a lane does not matter, so batches are the same with any number of
workers, and those of two processes are together those of one with twice the rows.

Everybody reads the whole stream and tokenises what is in his lanes. Documents are shuffled in
blocks: a place in the stream is then the start of a block, and reading on from there is exact.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from longctx_layers.data.loader import Position, TrainingLoader, torch_loader
from longctx_layers.data.packing import Batch, Shape, row, stack
from longctx_layers.data.store import digest
from longctx_layers.data.tokenizers import Tokenizer

BLOCK_DOCUMENTS, BLOCK_CHARACTERS = 1024, 1 << 24  # whichever is reached first


class Dealer:
    """The documents of one epoch, in order, with the lane that each belongs to.

    Args:
        source: an iterable dataset with a column `text`.
        held_out: digests of documents to leave out.
        n_lanes: of all processes together.
        order: numbers that the order within a block is drawn from.
        anchor: where to start, from `anchors`; None for the first document.
    """

    def __init__(
        self,
        source: Any,
        held_out: Container[int],
        n_lanes: int,
        order: tuple[int, ...],
        anchor: dict[str, Any] | None = None,
    ):
        self.source = copy.deepcopy(source)  # its place is in it
        self.held_out, self.order = held_out, order
        start = {
            "block": 0,
            "source": None,
            "characters": [0] * n_lanes,
            "documents": [0] * n_lanes,
        }
        self.anchors = deque([anchor or start])
        self.characters = list(self.anchors[0]["characters"])
        self.documents = list(self.anchors[0]["documents"])

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """`(lane, number, text)`: the text is document `number` of the lane."""
        block = self.anchors[0]["block"]
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
        done: documents that lie before the first token.
        offset: the first token's place in its document.
        parity: of the segment ids: 0 or 1, another one in the next epoch, so that no state is
            carried over from the last one.
    """

    def __init__(self, done: int, offset: int, parity: int):
        self.done, self.offset, self.parity = done, offset, parity
        self.texts: deque[str] = deque()
        self.ready: deque[np.ndarray] = deque()  # ids of documents; of the first, all as well
        self.n_ready = 0

    def add(self, number: int, text: str) -> None:
        """Document `number` of the lane, unless it lies before the first token."""
        if number >= self.done:
            self.texts.append(text)

    def tokenise(self, tokenizer: Tokenizer) -> None:
        """The next text becomes ready tokens."""
        (ids,) = tokenizer.encode_batch([self.texts.popleft()])
        skipped = 0 if self.ready else self.offset
        self.ready.append(np.append(ids.astype(np.int64), tokenizer.end_of_text))
        self.n_ready += len(self.ready[-1]) - skipped

    def take(self, length: int) -> Batch:
        """A row of `length`; what is not ready becomes pads."""
        ids, segments, missing, offset = [], [], length + 1, self.offset
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


class Piece(NamedTuple):
    """What one worker adds to a batch, and where that leaves it."""

    rows: Batch  # every n-th row of the batch, from the worker's own number on
    lanes: dict[int, tuple[int, int]]  # `done` and `offset` of each of the worker's lanes
    anchor: dict[str, Any]  # a place in the stream before all that these lanes still need
    more: bool  # whether tokens are left


class StreamedRows(IterableDataset):
    """Pieces of batches, without end: pads follow the last document."""

    def __init__(
        self, source: Any, held_out: Container[int], tokenizer: Tokenizer, shape: Shape, seed: int
    ):
        self.source, self.held_out, self.tokenizer = source, held_out, tokenizer
        self.shape, self.seed = shape, seed
        self.position = Position()

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are workers instead
            # Otherwise `datasets` would show each worker another part of the stream.
            torch.utils.data.get_worker_info = lambda: None
        epoch, _, state = self.position
        state = state or {"anchor": None, "lanes": {}}
        dealer = Dealer(
            self.source, self.held_out, self.shape.all_rows, (self.seed, epoch), state["anchor"]
        )
        begin = self.shape.rank * self.shape.rows
        lanes = {
            lane: Lane(*state["lanes"].get(lane, (0, 0)), parity=epoch % 2)
            for lane in range(begin + first, begin + self.shape.rows, step)
        }
        documents = iter(dealer)
        while True:
            for number, lane in lanes.items():
                while lane.n_ready <= self.shape.length and self._feed(number, lanes, documents):
                    pass
            rows = stack([lane.take(self.shape.length) for lane in lanes.values()])
            places = {number: (lane.done, lane.offset) for number, lane in lanes.items()}
            while len(dealer.anchors) > 1 and all(
                dealer.anchors[1]["documents"][number] <= done
                for number, (done, _) in places.items()
            ):
                dealer.anchors.popleft()
            more = any(lane.n_ready for lane in lanes.values())
            yield Piece(rows, places, dealer.anchors[0], more)

    def _feed(
        self, number: int, lanes: dict[int, Lane], documents: Iterator[tuple[int, int, str]]
    ) -> bool:
        """Make one more document of lane `number` ready, if there is one."""
        while not lanes[number].texts:
            dealt = next(documents, None)
            if dealt is None:
                return False
            owner, place, text = dealt
            if owner in lanes:
                lanes[owner].add(place, text)
        lanes[number].tokenise(self.tokenizer)
        return True


class StreamedLoader(TrainingLoader):
    """Batches of a stream; `options` are those of torch's `DataLoader`."""

    def __init__(
        self,
        data: Any,
        rows: StreamedRows,
        num_workers: int,
        endless: bool = False,
        **options: Any,
    ):
        super().__init__(data, endless)
        self.rows = rows
        self.num_workers = min(num_workers, rows.shape.rows)
        self._loader = torch_loader(
            rows, num_workers=self.num_workers, collate_fn=_unchanged, **options
        )

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        self.rows.position = position
        pieces = iter(self._loader)
        epoch, number, _ = position
        more = True
        while more:
            parts = [next(pieces) for _ in range(max(1, self.num_workers))]
            number += 1
            more = _any_process(any(part.more for part in parts), self.rows.shape.world_size)
            stream = merged([{"anchor": part.anchor, "lanes": part.lanes} for part in parts])
            following = Position(epoch, number, stream) if more else Position(epoch + 1)
            yield _interleaved([part.rows for part in parts]), following


def merged(streams: list[dict[str, Any]]) -> dict[str, Any]:
    """The places of all lanes, and an anchor before all of them."""
    return {
        "anchor": min((stream["anchor"] for stream in streams), key=lambda a: a["block"]),
        "lanes": {n: place for stream in streams for n, place in stream["lanes"].items()},
    }


def of_all_processes(position: Position, world_size: int) -> Position:
    """The position with the lanes of all processes; to be called by all of them."""
    if position.stream is None or world_size == 1:
        return position
    streams: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(streams, position.stream)
    return position._replace(stream=merged(streams))


def _any_process(here: bool, world_size: int) -> bool:
    """Whether it is so on any process: all of them must give their batches up together."""
    if world_size == 1:
        return here
    device = "cpu" if "gloo" in dist.get_backend() else "cuda"
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _interleaved(parts: list[Batch]) -> Batch:
    """Row b of part w is row `b * len(parts) + w`."""
    n = len(parts)
    batch = {
        name: values.new_empty(sum(len(p[name]) for p in parts), values.shape[1])
        for name, values in parts[0].items()
    }
    for name, values in batch.items():
        for worker, part in enumerate(parts):
            values[worker::n] = part[name]
    return batch


def _unchanged(piece: Piece) -> Piece:
    return piece
