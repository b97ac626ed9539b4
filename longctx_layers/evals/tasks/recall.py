"""The common base of tasks that hide one value in noise and ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longctx_layers.evals.tasks.base import Task, put
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.ops.checks import expect_positive

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Base of the tasks that state one value among noise and ask for it later.

    Args:
        digits: number of tokens of the value. A question provides all but the last of them, so
            that each token is an answer of its own.
        distinct: whether noise is drawn from other symbols than values are.
    """

    knobs: ClassVar[Mapping[str, str]] = {**Task.knobs, "digits": "number of tokens of the value"}

    digits: int = 1
    distinct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("digits", self.digits)
        most = len(self.vocabulary.symbols) - 2
        if self.distinct and self.n_symbols > most:
            raise ValueError(
                f"n_symbols: expected at most {most}, which leaves two symbols for the noise, got "
                f"{self.n_symbols}"
            )

    @property
    def told_length(self) -> int:
        """Number of tokens of the value with the mark before it."""
        return len(self.vocabulary.told) + self.digits

    @property
    def question_length(self) -> int:
        """Number of tokens of a question: its mark, and all tokens of the value but the last."""
        return len(self.vocabulary.asked) + self.digits - 1

    @property
    def shortest(self) -> int:
        return self.told_length + self.distance + self.question_length

    def with_extra_questions(self, count: int) -> Self:
        """A value of several tokens is repeated by each question, which would give it away."""
        return self if self.digits > 1 else super().with_extra_questions(count)

    def blank(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise `[B, T]`, labels without a question `[B, T]`, and values `[B, digits]`."""
        n = self.n_symbols
        noise = self.symbols(n, 2 * n) if self.distinct else self.symbols(0, n)
        ids = self.drawn(noise, batch, length, generator=generator)
        value = self.drawn(self.symbols(0, n), batch, self.digits, generator=generator)
        return ids, torch.full_like(ids, IGNORED_LABEL), value

    def tell(self, ids: Tensor, place: Tensor, value: Tensor, mark: tuple[int, ...]) -> None:
        """Write a mark and the value `[B, digits]` from position `place` `[B]` on."""
        put(ids, place, torch.cat([torch.tensor(mark).expand(len(ids), -1), value], dim=1))

    def ask(
        self,
        ids: Tensor,
        labels: Tensor,
        place: Tensor,
        value: Tensor,
        where: Tensor | None = None,
    ) -> None:
        """Write a question from position `place` `[B]` on, and its answers into the labels."""
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
        """Spread `extra_questions` between positions `first` `[B]` and `last`.

        The range is cut into equal parts with one question each, at a random position. Rows whose
        parts are too short for a question get none.
        """
        size = self.question_length
        part = (last - first).clamp(min=0) // max(1, self.extra_questions)
        for i in range(self.extra_questions):
            free = torch.rand(len(ids), generator=generator) * (part - size + 1).clamp(min=1)
            self.ask(ids, labels, first + i * part + free.long(), value, part >= size)
