"""The task copy_recall: several tokens at the beginning, asked for in order at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx_layers.evals.tasks.base import Batch, register_task
from longctx_layers.evals.tasks.recall import Recall


@register_task
@dataclass(frozen=True, kw_only=True)
class CopyRecall(Recall):
    """Repeat, at the end of a sequence, the tokens that stood at its beginning.

    A sequence is `MARK s1 ... sn noise QUESTION s1 ... s(n-1)`, and the answers are s1 to sn. Noise
    has symbols of its own.

    >>> import torch
    >>> batch = CopyRecall(digits=3).draw(2, 64, torch.Generator().manual_seed(0))
    >>> int((batch.labels[0] >= 0).sum())
    3
    """

    name: ClassVar[str] = "copy_recall"
    symbol_sets: ClassVar[int] = 2  # of values and of noise

    digits: int = 4
    distinct: bool = True

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        ids, labels, value = self.blank(batch, length, generator)
        asked = length - self.question_length
        begin = torch.zeros(batch, dtype=torch.int64)
        self.tell(ids, begin, value, self.vocabulary.told)
        self.ask_between(ids, labels, begin + self.told_length, asked, value, generator)
        self.ask(ids, labels, begin + asked, value)
        return Batch(ids, labels, asked)
