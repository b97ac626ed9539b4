"""The task chunk_transfer: does a value pass from one chunk to all later ones?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from longctx_layers.evals.tasks.base import Batch, register_task
from longctx_layers.evals.tasks.recall import Recall
from longctx_layers.evals.tasks.vocabulary import Vocabulary
from longctx_layers.ops.checks import expect_positive

if TYPE_CHECKING:
    from typing_extensions import Self


@register_task
@dataclass(frozen=True, kw_only=True)
class ChunkTransfer(Recall):
    """State a value somewhere in the first chunk and ask for it at the end of every later one.

    Args:
        chunk_size: number of tokens of a chunk: that of the model, or another.

    >>> import torch
    >>> batch = ChunkTransfer(chunk_size=16).draw(1, 64, torch.Generator().manual_seed(0))
    >>> (batch.labels[0] >= 0).nonzero().flatten().tolist()
    [31, 47, 63]
    """

    name: ClassVar[str] = "chunk_transfer"
    chunk_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("chunk_size", self.chunk_size)
        least = max(self.told_length, self.question_length)
        if self.chunk_size < least:
            raise ValueError(
                f"chunk_size: expected at least the {least} tokens that the value or a question "
                f"takes, got {self.chunk_size}"
            )

    @classmethod
    def for_model(cls, vocabulary: Vocabulary, chunk_size: int, /, **options: Any) -> Self:
        """With chunks of the model's size."""
        return super().for_model(vocabulary, chunk_size, **{"chunk_size": chunk_size, **options})

    @property
    def first_end(self) -> int:
        """The end of the first chunk whose question is at least `distance` away from the value."""
        asked = self.chunk_size + self.distance + self.question_length
        return max(2, math.ceil(asked / self.chunk_size)) * self.chunk_size

    @property
    def shortest(self) -> int:
        return self.first_end

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        ids, labels, value = self.blank(batch, length, generator)
        free = self.chunk_size - self.told_length + 1
        place = torch.randint(free, (batch,), generator=generator)
        self.tell(ids, place, value, self.vocabulary.told)
        begin = torch.zeros(batch, dtype=torch.int64)
        for end in range(self.first_end, length + 1, self.chunk_size):
            self.ask(ids, labels, begin + end - self.question_length, value)
        return Batch(ids, labels, self.first_end - self.question_length)
