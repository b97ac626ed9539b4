"""Does a memory fade with the distance? The task drift_curve, and the drift of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longctx_layers.evals.statistics import Z
from longctx_layers.evals.tasks.base import Batch, register_task
from longctx_layers.evals.tasks.recall import Recall
from longctx_layers.ops.checks import expect_positive


@register_task
@dataclass(frozen=True, kw_only=True)
class DriftCurve(Recall):
    """Ask for one value again and again, ever further away from where it was stated.

    Args:
        questions: number of questions, at positions that grow geometrically from `distance` to the
            end of the sequence; fewer if they would overlap.

    >>> task = DriftCurve(distance=10, questions=4)
    >>> task.places(100)
    [12, 24, 49, 99]
    """

    name: ClassVar[str] = "drift_curve"
    knobs: ClassVar[Mapping[str, str]] = {
        **Recall.knobs,
        "questions": "number of questions in a sequence",
    }
    drawn_by_place: ClassVar[bool] = True

    questions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive("questions", self.questions)

    def places(self, length: int) -> list[int]:
        """The positions where questions begin; no two questions overlap."""
        first = self.told_length + self.distance
        last = length - self.question_length
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


class Slope(NamedTuple):
    """The slope of a loss over the position, in nats per 1000 tokens, with its 95 % interval."""

    mean: float
    low: float
    high: float


def drift(loss: Tensor, part: int, skip: int = 0) -> Slope:
    """Does the loss on a long text rise with the position? Its slope, with the text held fixed.

    Row i of `loss` belongs to row i of `rotations(ids, B, part)`: every part of the text was read
    at B positions. The mean of each part is subtracted, because some parts are harder than others,
    and one line is fitted to the rest. The interval treats the parts as independent (a
    cluster-robust error).

    Args:
        loss: `[B, T]`, in nats.
        part: number of tokens of a part.
        skip: number of positions to leave out at the beginning, where there is little context.

    Raises:
        ValueError: for fewer than two rows or ten parts.

    >>> loss = 2.0 + 0.001 * torch.arange(1000.0).expand(2, -1)
    >>> round(drift(loss, part=10).mean, 4)
    1.0
    """
    rows, length = loss.shape
    parts = length // part
    if rows < 2 or parts < 10 or parts % rows:
        raise ValueError(
            "drift: expected at least 2 rotations, and at least 10 parts that they divide evenly, "
            f"got {rows} rotations and {parts} parts; use a longer text or smaller parts"
        )
    means = loss[:, : parts * part].double().view(rows, parts, part).mean(-1)
    position = (torch.arange(parts, dtype=torch.float64) + 0.5) * part / 1000
    shift = parts // rows * torch.arange(rows)
    index = (torch.arange(parts) - shift[:, None]) % parts  # where each row reads a part
    y, x = means.gather(1, index), position[index]  # [rows, parts of the text]
    kept = (x >= (skip / 1000)).double()
    count = kept.sum(0).clamp(min=1)
    x = (x - (x * kept).sum(0) / count) * kept
    y = (y - (y * kept).sum(0) / count) * kept
    spread = (x * x).sum()
    slope = ((x * y).sum() / spread).item()
    scores = (x * (y - slope * x)).sum(0)  # of each part
    half = Z * (scores.pow(2).sum().sqrt() / spread).item()
    return Slope(slope, slope - half, slope + half)
