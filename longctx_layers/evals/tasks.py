"""What a memory task is: a seeded generator with knobs for how hard it is.

A task draws batches of sequences whose answers are known; in evaluation none of them can be
answered from what the stacked windows reach, as long as `distance` is beyond that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longctx_layers.evals.vocabulary import SYNTHETIC, Vocabulary
from longctx_layers.ops.checks import expect_count, expect_positive


class Batch(NamedTuple):
    """Sequences with their questions.

    Attributes:
        ids: `[B, T]` int64.
        labels: `[B, T]` int64, the token to answer with at t; -100 where nothing is asked.
        asked: the first place that belongs to a question.
    """

    ids: Tensor
    labels: Tensor
    asked: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A memory task.

    Args:
        vocabulary: the ids it is written in.
        n_symbols: how many symbols values are drawn from, all equally likely.
        distance: least number of tokens between what is told and its question.
        extra_questions: further questions in each sequence; for training, which learns nothing
            for long from one question a sequence.
    """

    name: ClassVar[str]
    vocabulary: Vocabulary = SYNTHETIC
    n_symbols: int = 32
    distance: int = 0
    extra_questions: int = 0

    def __post_init__(self) -> None:
        expect_count("distance", self.distance)
        expect_count("extra_questions", self.extra_questions)
        expect_positive("n_symbols", self.n_symbols)
        if not 2 <= self.n_symbols <= len(self.vocabulary.symbols):
            raise ValueError(
                f"n_symbols: expected from 2 to the vocabulary's {len(self.vocabulary.symbols)}, "
                f"got {self.n_symbols}; change it"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values that an answer may have."""
        return 1 / self.n_symbols

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The least length of a sequence."""

    @abstractmethod
    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Draw sequences of a length that is known to fit."""

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Draw `[batch, length]` sequences: the same ones for the same state of the generator.

        Raises:
            ValueError: if the length is below `shortest`.
        """
        if length < self.shortest:
            raise ValueError(
                f"{self.name}: expected a length of at least {self.shortest} (distance "
                f"{self.distance}), got {length}; make it longer, or the distance shorter"
            )
        return self.write(batch, length, generator)

    def symbols(self, first: int, last: int) -> Tensor:
        """Ids of the symbols from `first` to before `last`, as far as there are."""
        return torch.tensor(self.vocabulary.symbols[first:last])

    def drawn(self, pool: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
        """Ids out of a pool, all equally likely."""
        return pool[torch.randint(len(pool), shape, generator=generator)]


def put(ids: Tensor, place: Tensor, block: Tensor, where: Tensor | None = None) -> None:
    """Write `[B, k]` into rows of `[B, T]` from `place` `[B]` on; `where` `[B]` leaves rows out."""
    index = place[:, None] + torch.arange(block.shape[1])
    if where is not None:
        index = torch.where(where[:, None], index, 0)
        block = torch.where(where[:, None], block, ids.gather(1, index))
    ids.scatter_(1, index, block)
