"""Loaders of training batches that know which comes next, and of validation batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from longctx_layers.data.packing import Batch, Epoch


class Position(NamedTuple):
    """Where training stands: the batch to take next, and for a stream, what lies before it."""

    epoch: int = 0
    batch: int = 0
    stream: dict[str, Any] | None = None


class Progress:
    """The position as training takes batches.

    A trainer may fetch a batch before it takes it, so the two are told apart.

    Attributes:
        continues: whether the trainer's next epoch starts where the last one stopped, and not with
            the next pass over the data: so that a limit of its batches leaves nothing unseen.
        repeats: whether every epoch has the batches of the first.
    """

    def __init__(self, position: Position | None = None):
        self.position = position or Position()
        self.continues = self.repeats = False
        self._starts_here = True
        self._following: deque[Position] = deque()

    def load(self, position: Position) -> None:
        """Start the next epoch at a position."""
        self.position, self._starts_here = position, True
        self._following.clear()

    def begin(self) -> Position:
        """Start an epoch: where a new or loaded position says, otherwise the next one."""
        self._following.clear()
        if not self._starts_here:
            self._end_epoch()
        self._starts_here = False
        return self.position

    def fetched(self, following: Position) -> None:
        """A batch is ready; once it is taken, `following` is the position."""
        self._following.append(following)

    def taken(self, last: bool = False) -> None:
        """The first of the batches that are ready is used; it may be the last of its epoch."""
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
    """Iterating it gives the batches of an epoch: the first time from the position on.

    Args:
        data: the data module, which has the `progress`. With a trainer it counts what is taken;
            without one a batch is taken when it is fetched.
        endless: whether an epoch ends where the trainer says, after any number of passes.
    """

    def __init__(self, data: Any, endless: bool = False):
        self.data, self.endless = data, endless

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """The batches of an epoch from a position on, each with the position behind it."""
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
        state: dict[str, Any] = self.data.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state)


class StoredBatches(Dataset):
    """Batches of a store by `(epoch, batch)`; `make_epoch(number=...)` draws an epoch's orders."""

    def __init__(self, make_epoch: Callable[..., Epoch]):
        self.make_epoch = make_epoch
        self._epoch: tuple[int, Epoch] | None = None

    def epoch(self, number: int) -> Epoch:
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, self.make_epoch(number=number)
        return self._epoch[1]

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, batch = place
        return self.epoch(epoch).batch(batch)


class _Places(Sampler):
    """`(epoch, batch)` of the batches to load; workers that persist are told through it."""

    def __init__(self, epoch: int, first: int, stop: int):
        self.epoch, self.first, self.stop = epoch, first, stop

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, batch) for batch in range(self.first, self.stop))

    def __len__(self) -> int:
        return self.stop - self.first


def torch_loader(dataset: Dataset, **options: Any) -> DataLoader:
    """Torch's loader of whole batches, which leaves torch's global random numbers alone.

    It stays inside the loaders here: Lightning would give it a sampler of its own.
    """
    return DataLoader(dataset, batch_size=None, generator=torch.Generator(), **options)


class StoredLoader(TrainingLoader):
    """Batches of a store; `options` are those of torch's `DataLoader`."""

    def __init__(self, data: Any, batches: StoredBatches, **options: Any):
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
            # Behind the last batch stands the next epoch.
            following = (epoch, number) if number < self._length else (epoch + 1, 0)
            yield batch, Position(*following)


class ValidationLoader:
    """The batches of the only epoch, in order."""

    def __init__(self, batches: StoredBatches, **options: Any):
        self._length = len(batches.epoch(0))
        self._loader = torch_loader(batches, sampler=_Places(0, 0, self._length), **options)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)
