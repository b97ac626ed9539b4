"""One value asked for at many distances: drift_curve and chunk_transfer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx_layers.evals.recall import Recall
from longctx_layers.evals.tasks import Batch
from longctx_layers.ops.checks import expect_positive


@dataclass(frozen=True, kw_only=True)
class DriftCurve(Recall):
    """One value told at the beginning and asked for again and again, ever further away.

    Args:
        questions: how many, at places that grow geometrically from `distance` to the end.
    """

    name: ClassVar[str] = "drift_curve"
    questions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("questions", self.questions)

    def places(self, length: int) -> list[int]:
        """Where questions begin, none over another."""
        first, last = self.told_length + self.distance, length - self.question_length
        ratio = (last / max(1, first)) ** (1 / max(1, self.questions - 1))
        places: list[int] = []
        for i in range(self.questions):
            place = min(last, round(max(1, first) * ratio**i))
            if not places or place >= places[-1] + self.question_length:
                places.append(place)
        return places

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        ids, labels, value = self.blank(batch, length, generator)
        begin = torch.zeros(batch, dtype=torch.int64)
        self.tell(ids, begin, value, self.vocabulary.told)
        places = self.places(length)
        if self.extra_questions:
            places = [length - self.question_length]
            self.ask_between(ids, labels, begin + self.told_length, places[0], value, generator)
        for place in places:
            self.ask(ids, labels, begin + place, value)
        return Batch(ids, labels, places[0])


@dataclass(frozen=True, kw_only=True)
class ChunkTransfer(Recall):
    """Told somewhere in the first chunk, asked for at the end of every later one.

    Args:
        chunk_size: tokens of a chunk; that of the model, or another.
    """

    name: ClassVar[str] = "chunk_transfer"
    chunk_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("chunk_size", self.chunk_size)
        least = max(self.told_length, self.question_length)
        if self.chunk_size < least:
            raise ValueError(
                f"chunk_size: expected at least the {least} tokens of value and question, got "
                f"{self.chunk_size}; make it larger"
            )

    @property
    def first_end(self) -> int:
        """Where the first chunk ends in which the question is as far off as it must be."""
        asked = self.chunk_size + self.distance + self.question_length
        return max(2, math.ceil(asked / self.chunk_size)) * self.chunk_size

    @property
    def shortest(self) -> int:
        return self.first_end

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        ids, labels, value = self.blank(batch, length, generator)
        free = self.chunk_size - self.told_length + 1
        self.tell(
            ids, torch.randint(free, (batch,), generator=generator), value, self.vocabulary.told
        )
        begin = torch.zeros(batch, dtype=torch.int64)
        for end in range(self.first_end, length + 1, self.chunk_size):
            self.ask(ids, labels, begin + end - self.question_length, value)
        return Batch(ids, labels, self.first_end - self.question_length)
