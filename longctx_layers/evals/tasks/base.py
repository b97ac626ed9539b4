"""What a memory task is, and the registry of tasks.

A task draws sequences that contain questions with known answers. If the option `distance` exceeds
what a model's stacked windows can see, only the model's recurrent state can carry the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from longctx_layers.evals.tasks.vocabulary import SYNTHETIC, Vocabulary
from longctx_layers.ops.checks import expect_count, expect_positive

if TYPE_CHECKING:
    from typing_extensions import Self

# Evaluations that the program offers beside the tasks: passkey at a grid of depths, and the loss
# over a long text. No task can have their names.
NEEDLE = "needle"
STREAMING = "streaming_ppl"


class Batch(NamedTuple):
    """Sequences with questions in them.

    Attributes:
        ids: `[B, T]` int64.
        labels: `[B, T]` int64: the token that should follow position t, -100 where there is no
            question.
        asked: the first position that belongs to a question.
    """

    ids: Tensor
    labels: Tensor
    asked: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base class of memory tasks: subclass it to measure something new.

    A subclass is a frozen dataclass with a `name`, `shortest` and `write`; `register_task` makes it
    available to the evaluation program and to reports.

    Args:
        vocabulary: the token ids that sequences are written in.
        n_symbols: number of symbols that values are drawn from, all equally likely.
        distance: minimum number of tokens between a value and the question about it.
        extra_questions: further questions in each sequence. Training uses them, because a model
            learns very slowly from a single question in a long sequence.

    Attributes:
        name: what `--task` calls it.
        knobs: the options (int, float or str) that the evaluation program offers as flags, with
            their help texts.
        symbol_sets: number of disjoint sets of `n_symbols` symbols that the task draws from.
        drawn_by_place: whether reports draw the accuracy by the position of the question.
    """

    name: ClassVar[str]
    knobs: ClassVar[Mapping[str, str]] = {
        "distance": "minimum number of tokens between a value and its question; by default more "
        "than the stacked windows can see",
        "n_symbols": "number of symbols that values are drawn from",
    }
    symbol_sets: ClassVar[int] = 1
    drawn_by_place: ClassVar[bool] = False

    vocabulary: Vocabulary = SYNTHETIC
    n_symbols: int = 32
    distance: int = 0
    extra_questions: int = 0

    def __post_init__(self) -> None:
        expect_count("distance", self.distance)
        expect_count("extra_questions", self.extra_questions)
        expect_positive("n_symbols", self.n_symbols)
        available = len(self.vocabulary.symbols)
        if not 2 <= self.n_symbols <= available:
            raise ValueError(
                f"n_symbols: expected 2 to {available}, the number of symbols in the vocabulary, "
                f"got {self.n_symbols}"
            )

    @classmethod
    def for_model(cls, vocabulary: Vocabulary, chunk_size: int, /, **options: Any) -> Self:
        """The task as it suits a model; `options` take precedence.

        Args:
            vocabulary: in the model's token ids. A tokenizer may offer fewer symbols than the
                task uses by default.
            chunk_size: the size of the model's chunks or windows.
        """
        fitting = min(cls.n_symbols, len(vocabulary.symbols) // cls.symbol_sets)
        return cls(vocabulary=vocabulary, **{"n_symbols": fitting, **options})

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing among the possible answers."""
        return 1 / self.n_symbols

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The minimum length of a sequence."""

    @abstractmethod
    def write(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Draw sequences; `draw` has checked that the length is at least `shortest`."""

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """Draw `[batch, length]` sequences, reproducibly for the same state of the generator.

        Raises:
            ValueError: if the length is below `shortest`.
        """
        if length < self.shortest:
            raise ValueError(
                f"{self.name}: expected a length of at least {self.shortest} (with distance "
                f"{self.distance}), got {length}; use longer sequences or a smaller distance"
            )
        return self.write(batch, length, generator)

    def with_extra_questions(self, count: int) -> Self:
        """The task with further questions for training, if those do not give the answer away."""
        return replace(self, extra_questions=count)

    def symbols(self, first: int, last: int) -> Tensor:
        """Ids of the symbols `first` to `last - 1`; fewer if the vocabulary ends before."""
        return torch.tensor(self.vocabulary.symbols[first:last])

    def drawn(self, pool: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
        """Ids drawn uniformly from `pool`, with replacement."""
        return pool[torch.randint(len(pool), shape, generator=generator)]


TASKS: dict[str, type[Task]] = {}

TaskT = TypeVar("TaskT", bound=Task)


def register_task(kind: type[TaskT]) -> type[TaskT]:
    """Make a task available under its `name`, as a class decorator.

    `TASKS`, `python -m longctx_layers.evals.synthetic --task NAME` and reports then offer it.

    Raises:
        ValueError: if it has no name, or the name is taken.
    """
    name = getattr(kind, "name", "")
    if not name:
        raise ValueError(f"{kind.__name__}: expected a class attribute `name`, got none")
    if name in (NEEDLE, STREAMING) or TASKS.get(name, kind) is not kind:
        raise ValueError(f"{kind.__name__}: the name {name!r} is taken; choose another")
    TASKS[name] = kind
    return kind


def put(ids: Tensor, place: Tensor, block: Tensor, where: Tensor | None = None) -> None:
    """Write `block` `[B, k]` into `ids` `[B, T]`, in each row from position `place` `[B]` on.

    Args:
        where: `[B]` bool, the rows to write; all by default.
    """
    index = place[:, None] + torch.arange(block.shape[1])
    if where is not None:
        index = torch.where(where[:, None], index, 0)
        block = torch.where(where[:, None], block, ids.gather(1, index))
    ids.scatter_(1, index, block)
