"""The task passkey: one value in noise of the same symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx_layers.evals.tasks.base import Batch, register_task
from longctx_layers.evals.tasks.recall import Recall
from longctx_layers.ops.checks import expect_count


@register_task
@dataclass(frozen=True, kw_only=True)
class Passkey(Recall):
    """Retrieve one value that is hidden in noise of the same symbols.

    A sequence is `noise MARK value noise QUESTION`, and the answer is the value.

    Args:
        distractors: number of values with another mark, at random positions before the question,
            as far as there is room.
        depth: where the value is stated, from 0 (at the beginning) to 1 (as late as `distance`
            permits); None for anywhere.

    Source: Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300.

    >>> import torch
    >>> batch = Passkey(distance=64).draw(2, 128, torch.Generator().manual_seed(0))
    >>> batch.ids.shape, batch.asked
    (torch.Size([2, 128]), 127)
    """

    name: ClassVar[str] = "passkey"
    knobs: ClassVar[Mapping[str, str]] = {
        **Recall.knobs,
        "distractors": "number of values with another mark",
    }

    distractors: int = 0
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("distractors", self.distractors)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth: expected a number from 0 to 1, or None, got {self.depth}")

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        ids, labels, value = self.blank(batch, length, generator)
        asked = length - self.question_length
        free = length - self.shortest
        place = torch.randint(free + 1, (batch,), generator=generator)
        if self.depth is not None:
            place = torch.full_like(place, round(self.depth * free))
        self._distract(ids, asked, generator)
        self.tell(ids, place, value, self.vocabulary.told)
        self.ask_between(ids, labels, place + self.told_length, asked, value, generator)
        self.ask(ids, labels, torch.full_like(place, asked), value)
        return Batch(ids, labels, asked)

    def _distract(self, ids: Tensor, asked: int, generator: torch.Generator) -> None:
        # Written first, so that the value and the question overwrite what they meet.
        size = len(self.vocabulary.other) + self.digits
        if asked < size:
            return
        pool = self.symbols(0, self.n_symbols)
        for _ in range(self.distractors):
            place = torch.randint(asked - size + 1, (len(ids),), generator=generator)
            value = self.drawn(pool, len(ids), self.digits, generator=generator)
            self.tell(ids, place, value, self.vocabulary.other)
