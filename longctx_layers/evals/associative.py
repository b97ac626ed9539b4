"""Recall of many pairs: which value stood behind which key?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx_layers.evals.tasks import Batch, Task
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.ops.checks import expect_positive


@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """Multi-query associative recall: pairs of key and value, then each key once: its value?

    Keys and values are drawn without repetition from the first and the last half of the symbols;
    between them there is nothing but fillers.

    Args:
        pairs: how many.

    Source: Arora et al., Zoology, arXiv 2312.04927.
    """

    name: ClassVar[str] = "mqar"
    n_symbols: int = 64
    pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("pairs", self.pairs)
        if self.extra_questions:
            raise ValueError("extra_questions: mqar asks for every key already; leave it at 0")
        if 2 * self.n_symbols > len(self.vocabulary.symbols) or self.pairs > self.n_symbols:
            raise ValueError(
                f"pairs: expected at most n_symbols = {self.n_symbols} keys and as many values out "
                f"of the vocabulary's {len(self.vocabulary.symbols)} symbols, got {self.pairs} "
                "pairs; change one of them"
            )

    @property
    def chance(self) -> float:
        """Of a guess among the values that were told."""
        return 1 / self.pairs

    @property
    def shortest(self) -> int:
        return 3 * self.pairs + self.distance

    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        n, pairs = self.n_symbols, self.pairs
        order = torch.rand(2, batch, n, generator=generator).argsort(-1)[..., :pairs]
        keys, values = self.symbols(0, n)[order[0]], self.symbols(n, 2 * n)[order[1]]
        ids = torch.full((batch, length), self.vocabulary.filler)
        labels = torch.full_like(ids, IGNORED_LABEL)
        ids[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
        asked = 2 * pairs + self.distance
        places = torch.rand(batch, length - asked, generator=generator).argsort(1)[:, :pairs]
        ids.scatter_(1, asked + places, keys)
        labels.scatter_(1, asked + places, values)
        return Batch(ids, labels, asked)
