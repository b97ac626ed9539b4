"""The task mqar: multi-query associative recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from longctx_layers.evals.tasks.base import Batch, Task, register_task
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.ops.checks import expect_positive

if TYPE_CHECKING:
    from typing_extensions import Self


@register_task
@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """Multi-query associative recall: read pairs of key and value, then answer each key once.

    Keys are drawn without repetition from the first `n_symbols` symbols, values from the next
    `n_symbols`. Between the pairs and the questions there are only fillers.

    Args:
        pairs: number of pairs.

    Source: Arora et al., Zoology, arXiv 2312.04927.

    >>> import torch
    >>> batch = Mqar(pairs=2).draw(1, 32, torch.Generator().manual_seed(0))
    >>> int((batch.labels >= 0).sum())
    2
    """

    name: ClassVar[str] = "mqar"
    knobs: ClassVar[Mapping[str, str]] = {
        **Task.knobs,
        "pairs": "number of pairs of key and value",
    }
    symbol_sets: ClassVar[int] = 2  # keys and values

    n_symbols: int = 64
    pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("pairs", self.pairs)
        if self.extra_questions:
            raise ValueError(
                f"extra_questions: expected 0, since mqar asks for every key anyway, got "
                f"{self.extra_questions}"
            )
        available = len(self.vocabulary.symbols)
        if 2 * self.n_symbols > available:
            raise ValueError(
                f"n_symbols: expected at most half of the vocabulary's {available} symbols, since "
                f"keys and values are distinct, got {self.n_symbols}"
            )
        if self.pairs > self.n_symbols:
            raise ValueError(
                f"pairs: expected at most n_symbols = {self.n_symbols}, since no key is used "
                f"twice, got {self.pairs}"
            )

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing among the values in the sequence."""
        return 1 / self.pairs

    @property
    def shortest(self) -> int:
        return 3 * self.pairs + self.distance

    def with_extra_questions(self, count: int) -> Self:
        """The task itself: it asks for every key anyway."""
        return self

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        n = self.n_symbols
        order = torch.rand(2, batch, n, generator=generator).argsort(-1)[..., : self.pairs]
        keys = self.symbols(0, n)[order[0]]
        values = self.symbols(n, 2 * n)[order[1]]
        ids = torch.full((batch, length), self.vocabulary.filler)
        labels = torch.full_like(ids, IGNORED_LABEL)
        ids[:, : 2 * self.pairs] = torch.stack([keys, values], dim=-1).flatten(1)
        asked = 2 * self.pairs + self.distance
        order = torch.rand(batch, length - asked, generator=generator).argsort(1)
        places = asked + order[:, : self.pairs]
        ids.scatter_(1, places, keys)
        labels.scatter_(1, places, values)
        return Batch(ids, labels, asked)
