"""Recall of one value among noise: passkey and copy_recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx_layers.evals.tasks import Batch, Task, put
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.ops.checks import expect_count, expect_positive


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Base of the tasks that tell one value among noise and ask for it: not one itself.

    Args:
        digits: tokens of the value. All but the last are given while it is asked for, so that
            each is an answer of its own.
        distinct: whether noise is drawn from other symbols than values are.
    """

    digits: int = 1
    distinct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("digits", self.digits)
        if self.distinct and len(self.vocabulary.symbols) < self.n_symbols + 2:
            raise ValueError(
                f"n_symbols: expected at most {len(self.vocabulary.symbols) - 2}, so that noise "
                f"has symbols of its own, got {self.n_symbols}; make it smaller"
            )

    @property
    def told_length(self) -> int:
        """Tokens of the value with its mark."""
        return len(self.vocabulary.told) + self.digits

    @property
    def question_length(self) -> int:
        """Tokens of a question: the last digit is never given."""
        return len(self.vocabulary.asked) + self.digits - 1

    @property
    def shortest(self) -> int:
        return self.told_length + self.distance + self.question_length

    def blank(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise `[B, T]`, no labels `[B, T]`, and values `[B, digits]`."""
        n = self.n_symbols
        noise = self.symbols(n, 2 * n) if self.distinct else self.symbols(0, n)
        ids = self.drawn(noise, batch, length, generator=generator)
        value = self.drawn(self.symbols(0, n), batch, self.digits, generator=generator)
        return ids, torch.full_like(ids, IGNORED_LABEL), value

    def tell(self, ids: Tensor, place: Tensor, value: Tensor, mark: tuple[int, ...]) -> None:
        """Write a mark and a value."""
        put(ids, place, torch.cat([torch.tensor(mark).expand(len(ids), -1), value], dim=1))

    def ask(
        self,
        ids: Tensor,
        labels: Tensor,
        place: Tensor,
        value: Tensor,
        where: Tensor | None = None,
    ) -> None:
        """Write a question, and its answers into the labels."""
        mark = torch.tensor(self.vocabulary.asked).expand(len(ids), -1)
        put(ids, place, torch.cat([mark, value[:, :-1]], dim=1), where)
        put(labels, place + mark.shape[1] - 1, value, where)

    def ask_between(
        self,
        ids: Tensor,
        labels: Tensor,
        first: Tensor,
        last: int,
        value: Tensor,
        generator: torch.Generator,
    ) -> None:
        """`extra_questions` between `first` `[B]` and `last`: one in each of as many equal parts.

        Rows whose parts are too short for a question get none.
        """
        size = self.question_length
        part = (last - first).clamp(min=0) // max(1, self.extra_questions)
        for i in range(self.extra_questions):
            free = torch.rand(len(ids), generator=generator) * (part - size + 1).clamp(min=1)
            self.ask(ids, labels, first + i * part + free.long(), value, part >= size)


@dataclass(frozen=True, kw_only=True)
class Passkey(Recall):
    """`noise TOLD v noise ASKED -> v`: a value among noise of the same symbols.

    Args:
        distractors: values with another mark, told at random places before the question, as far as
            they find room.
        depth: where the value is told, from 0 (at the beginning) to 1 (as late as `distance`
            lets it); None for anywhere.

    Source: Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300.
    """

    name: ClassVar[str] = "passkey"
    distractors: int = 0
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("distractors", self.distractors)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth: expected a number from 0 to 1, got {self.depth}; change it")

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
        # Written first: where one meets the value or a question, it is overwritten.
        size = len(self.vocabulary.other) + self.digits
        if asked < size:
            return
        for _ in range(self.distractors):
            place = torch.randint(asked - size + 1, (len(ids),), generator=generator)
            n = self.n_symbols
            value = self.drawn(self.symbols(0, n), len(ids), self.digits, generator=generator)
            self.tell(ids, place, value, self.vocabulary.other)


@dataclass(frozen=True, kw_only=True)
class CopyRecall(Recall):
    """`TOLD s1 ... sn gap ASKED -> s1 ... sn`: tokens told at the beginning, asked for in order."""

    name: ClassVar[str] = "copy_recall"
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
