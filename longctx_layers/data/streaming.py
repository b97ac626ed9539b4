"""Packed batches from a stream of documents that is tokenised while it is read.

The documents are dealt to lanes, one lane for each row of the batches of all processes: a document
goes to the lane with the least text so far. Row b of a batch continues its lane where row b of the
previous batch stopped. It does not matter who reads a lane. So the batches are the same with any
number of workers, and the batches of two processes are together those of one process with twice as
many rows.

Every worker reads the whole stream, and tokenises the documents of its own lanes. Documents are
shuffled within blocks, so that the start of a block is a place from which reading can resume
exactly.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from longctx_layers.data.lanes import Dealer, Lane
from longctx_layers.data.loader import Position, TrainingLoader, torch_loader
from longctx_layers.data.packing import Batch, Shape, stack
from longctx_layers.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from longctx_layers.data.module import LongContextData


class Piece(NamedTuple):
    """What one worker contributes to a batch, and its position after it.

    Attributes:
        rows: every n-th row of the batch, from the worker's own number on.
        lanes: `done` and `offset` of each of the worker's lanes.
        anchor: a place in the stream before everything that these lanes still need.
        more: whether tokens are left.
    """

    rows: Batch
    lanes: dict[int, tuple[int, int]]
    anchor: dict[str, Any]
    more: bool


class StreamedRows(IterableDataset[Piece]):
    """Pieces of batches, without end: after the last document there is only padding."""

    def __init__(
        self, source: Any, held_out: Container[int], tokenizer: Tokenizer, shape: Shape, seed: int
    ) -> None:
        self.source = source
        self.held_out = held_out
        self.tokenizer = tokenizer
        self.shape = shape
        self.seed = seed
        self.position = Position()

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already
            # Otherwise `datasets` would show each worker a different part of the stream.
            torch.utils.data.get_worker_info = lambda: None
        epoch = self.position.epoch
        state = self.position.stream or {"anchor": None, "lanes": {}}
        places: dict[int, tuple[int, int]] = state["lanes"]
        dealer = Dealer(
            self.source, self.held_out, self.shape.all_rows, (self.seed, epoch), state["anchor"]
        )
        begin = self.shape.rank * self.shape.rows
        lanes = {}
        for number in range(begin + first, begin + self.shape.rows, step):
            done, offset = places.get(number, (0, 0))
            lanes[number] = Lane(done, offset, parity=epoch % 2)
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
        """Tokenise one more document of lane `number`; returns False if there is none."""
        while not lanes[number].texts:
            document = next(documents, None)
            if document is None:
                return False
            owner, place, text = document
            if owner in lanes:
                lanes[owner].add(place, text)
        lanes[number].tokenise(self.tokenizer)
        return True


class StreamedLoader(TrainingLoader):
    """Batches of a stream; `options` are those of torch's `DataLoader`."""

    def __init__(
        self,
        data: LongContextData,
        rows: StreamedRows,
        num_workers: int,
        endless: bool = False,
        **options: Any,
    ) -> None:
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
    """The positions of all lanes, and an anchor before all of them."""
    return {
        "anchor": min((stream["anchor"] for stream in streams), key=lambda a: a["block"]),
        "lanes": {n: place for stream in streams for n, place in stream["lanes"].items()},
    }


def of_all_processes(position: Position, world_size: int) -> Position:
    """The position with the lanes of all processes; every process must call it."""
    if position.stream is None or world_size == 1:
        return position
    streams: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(streams, position.stream)
    return position._replace(stream=merged(streams))


def _any_process(here: bool, world_size: int) -> bool:
    """Whether it is true on any process: all must end an epoch at the same batch."""
    if world_size == 1:
        return here
    device = "cpu" if "gloo" in dist.get_backend() else "cuda"
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _interleaved(parts: list[Batch]) -> Batch:
    """One batch of the workers' parts: row b of part w is row `b * len(parts) + w`."""
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
