"""An evaluation that is known to be possible, and what a row of its results looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from longctx_layers import LongContextLM
from longctx_layers.evals.program.models import Loaded
from longctx_layers.evals.program.options import Options
from longctx_layers.evals.program.rows import Row, Rows


class Measurement(ABC):
    """How one kind of evaluation measures: memory tasks, the needle grid, a stream of text."""

    @abstractmethod
    def settings(self, options: Options) -> dict[str, Any]:
        """All that results depend on, apart from the model and the common options."""

    @abstractmethod
    def measure(self, plan: Plan, model: LongContextLM) -> None:
        """Add the rows that are missing to `plan.rows` and `plan.details`."""


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        options: from the flags.
        loaded: the model.
        measurement: how it is measured.
        key: equal for equal settings; every row has it.
        rows: the results by length.
        details: the results by depth or place.
    """

    options: Options
    loaded: Loaded
    measurement: Measurement
    key: str
    rows: Rows
    details: Rows

    def names(self, length: int) -> dict[str, Any]:
        """The fields that identify a row."""
        return {"task": self.options.task, "block": self.loaded.block, "length": length}

    def missing(self) -> list[int]:
        """The lengths that have no row yet."""
        return [n for n in self.options.lengths if self.rows.get(*self.names(n).values()) is None]

    def results(self) -> list[Row]:
        """The rows by length, as far as they exist."""
        rows = (self.rows.get(*self.names(n).values()) for n in self.options.lengths)
        return [row for row in rows if row is not None]


def bar(plan: Plan, total: int, what: str) -> tqdm[Any]:
    """A progress bar in tokens; there is none if the output is a file."""
    label = f"{plan.options.task} {plan.loaded.block} {what}"
    return tqdm(total=total, desc=label, unit="tokens", unit_scale=True, disable=None, leave=False)


COMMON = ("accuracy", "n", "chance", "low", "high", "accuracy_state_zeroed", "reach")


def row_of(plan: Plan, length: int, score: Mapping[str, Any], seconds: float) -> Row:
    """A row by length.

    Args:
        score: the `COMMON` fields and any others.
        seconds: what the measurement took.
    """
    model = plan.loaded.model
    return {
        **plan.names(length),
        **{name: score[name] for name in COMMON},
        "seconds": round(seconds, 3),
        **{name: value for name, value in score.items() if name not in COMMON},
        "trained": plan.options.is_trained,
        "train_steps": plan.options.train_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": model.state_size(length),
        "seed": plan.options.seed,
        "model": plan.loaded.fingerprint,
        "key": plan.key,
    }
