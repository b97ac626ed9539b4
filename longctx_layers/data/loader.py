"""Loaders of training batches, which can be resumed at any batch, and of validation batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from longctx_layers.data.packing import Batch, Epoch

if TYPE_CHECKING:
    from longctx_layers.data.module import LongContextData


class Position(NamedTuple):
    """How far training has come.

    Attributes:
        epoch, batch: of the batch to take next.
        stream: how far a stream was read, see `streaming`; None for stored documents.
    """

    epoch: int = 0
    batch: int = 0
    stream: dict[str, Any] | None = None


class Progress:
    """Keeps the position while training takes batches.

    A trainer may fetch a batch before it uses it, so both are counted.

    Attributes:
        position: of the batch that training uses next.
        continues: whether the trainer's next epoch starts where the last one stopped, rather than
            with the next pass over the data, so that a limit of its batches leaves nothing unseen.
        repeats: whether every epoch has the batches of the first.
    """

    def __init__(self, position: Position | None = None) -> None:
        self.position = position or Position()
        self.continues = False
        self.repeats = False
        self._starts_here = True
        self._following: deque[Position] = deque()

    def load(self, position: Position) -> None:
        """Make the next epoch start at a position."""
        self.position = position
        self._starts_here = True
        self._following.clear()

    def begin(self) -> Position:
        """Start an epoch: at a new or loaded position, otherwise the next epoch."""
        self._following.clear()
        if not self._starts_here:
            self._end_epoch()
        self._starts_here = False
        return self.position

    def fetched(self, following: Position) -> None:
        """Note that a batch is ready; once it is used, `following` is the position."""
        self._following.append(following)

    def taken(self, last: bool = False) -> None:
        """Note that the first ready batch is used; `last` if it is the last of its epoch."""
        if self._following:
            self.position = self._following.popleft()
        if last:
            self._end_epoch()

    def _end_epoch(self) -> None:
        if self.repeats:
            self.position = Position()
        elif self.position.batch and not self.continues:
            self.position = Position(self.position.epoch + 1)


class TrainingLoader:
    """The batches of an epoch; the first time from the position of the data module on.

    Args:
        data: the data module, which keeps the `progress`. With a trainer, the module
            records which batches were used; without one, a batch counts as used when fetched.
        endless: whether the trainer ends an epoch, after any number of passes over the data.
    """

    def __init__(self, data: LongContextData, endless: bool = False) -> None:
        self.data = data
        self.endless = endless

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """The batches of an epoch from a position on, each with the position after it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        progress = self.data.progress
        position = progress.begin()
        while True:
            for batch, following in self.batches(position):
                position = Position() if progress.repeats and not following.batch else following
                progress.fetched(position)
                if self.data.trainer is None:
                    progress.taken()
                yield batch
            if not self.endless:
                return

    # Lightning asks a loader whether it can be resumed.
    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state)


class StoredBatches(Dataset[Batch]):
    """The batches of a store by `(epoch, batch)`; `make_epoch(number=...)` makes an epoch."""

    def __init__(self, make_epoch: Callable[..., Epoch]) -> None:
        self.make_epoch = make_epoch
        self._epoch: tuple[int, Epoch] | None = None

    def epoch(self, number: int) -> Epoch:
        """An epoch; the last one is kept."""
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, self.make_epoch(number=number)
        return self._epoch[1]

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, batch = place
        return self.epoch(epoch).batch(batch)


class _Places(Sampler[tuple[int, int]]):
    """`(epoch, batch)` of the batches to load; persistent workers learn the epoch through it."""

    def __init__(self, epoch: int, first: int, stop: int) -> None:
        self.epoch = epoch
        self.first = first
        self.stop = stop

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, batch) for batch in range(self.first, self.stop))

    def __len__(self) -> int:
        return self.stop - self.first


def torch_loader(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """Torch's loader of whole batches, without any use of torch's global random numbers.

    It is wrapped by the loaders here, since Lightning would replace its sampler.
    """
    return DataLoader(dataset, batch_size=None, generator=torch.Generator(), **options)


class StoredLoader(TrainingLoader):
    """Batches of a store; `options` are those of torch's `DataLoader`."""

    def __init__(self, data: LongContextData, batches: StoredBatches, **options: Any) -> None:
        super().__init__(data)
        self._length = len(batches.epoch(data.progress.position.epoch))
        self._places = _Places(0, 0, self._length)
        self._loader = torch_loader(batches, sampler=self._places, **options)

    def __len__(self) -> int:
        return self._length

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        epoch, first, _ = position
        self._places.epoch, self._places.first = epoch, first
        for number, batch in enumerate(self._loader, first + 1):
            is_last = number == self._length
            yield batch, Position(epoch + 1) if is_last else Position(epoch, number)


class ValidationLoader:
    """The batches of a store in order, the same in every validation."""

    def __init__(self, batches: StoredBatches, **options: Any) -> None:
        self._length = len(batches.epoch(0))
        self._loader = torch_loader(batches, sampler=_Places(0, 0, self._length), **options)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)
