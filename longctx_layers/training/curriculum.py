"""Sequence lengths and windows that change in the course of training.

A length is set by folding the batch, `[B, T]` to `[B k, T / k]`: every token is still trained on,
and each piece begins a sequence of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from longctx_layers import LongContextLM


def check_schedule(name: str, schedule: Mapping[int, int] | None) -> None:
    """Raise ValueError unless a schedule maps steps, 0 among them, to sizes of at least 1."""
    if schedule is None:
        return
    if 0 not in schedule or min(schedule) < 0 or min(schedule.values()) < 1:
        raise ValueError(
            f"{name}: expected sizes of at least 1 by the step from which they hold, 0 "
            f"included, got {dict(schedule)}; pass e.g. {{0: 64, 1000: 128}}"
        )


def stage(schedule: Mapping[int, int], step: int) -> int:
    """The size that a schedule has at a step.

    >>> stage({0: 64, 1000: 128}, 999), stage({0: 64, 1000: 128}, 1000)
    (64, 128)
    """
    return schedule[max(begin for begin in schedule if begin <= step)]


def drawn_length(lengths: Sequence[int], seed: int, step: int) -> int:
    """The length of a step, all equally likely: equal on all ranks and after a restart."""
    return random.Random(f"length {seed} {step}").choice(list(lengths))


def fold(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Cut rows `[B, T]` into rows of `length` tokens, in the order of the text."""
    return {name: tensor.reshape(-1, length) for name, tensor in batch.items()}


@dataclass(frozen=True)
class LengthCurriculum:
    """Sequence lengths during training: by a schedule, or drawn for each step.

    Attributes:
        schedule: the length by the step from which it holds.
        mixed: lengths to draw from. With neither, batches stay as they are.

    Raises:
        ValueError: for both, or an invalid schedule.

    >>> lengths = LengthCurriculum({0: 4, 100: 8})
    >>> batch = {"ids": Tensor([[1, 2, 3, 4, 5, 6, 7, 8]])}
    >>> lengths.apply(batch, step=7, seed=0)["ids"].shape
    torch.Size([2, 4])
    """

    schedule: Mapping[int, int] | None = None
    mixed: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_schedule("length_curriculum", self.schedule)
        if self.schedule is not None and self.mixed is not None:
            raise ValueError(
                "length_curriculum, mixed_lengths: expected one of them, got both; leave one out"
            )

    def check(self, length: int, carry_state: bool) -> None:
        """Check that the lengths fit data with rows of `length` tokens.

        Raises:
            ValueError: if one does not divide the data's length, since a fold must not leave out
                tokens, or if the data carries state from batch to batch.
        """
        if self.mixed is not None:
            name, lengths = "mixed_lengths", list(self.mixed)
        elif self.schedule is not None:
            name, lengths = "length_curriculum", list(self.schedule.values())
        else:
            return
        wrong = [n for n in lengths if n < 1 or length % n]
        if wrong or not lengths:
            raise ValueError(
                f"{name}: expected divisors of the data's sequence length {length}, got "
                f"{lengths}; change {wrong}, or --data.seq_len to a common multiple"
            )
        if carry_state:
            raise ValueError(
                f"{name}: expected data with independent rows, got --data.carry_state=True, where "
                "each batch continues the previous one; leave one of them out"
            )

    def apply(self, batch: dict[str, Tensor], step: int, seed: int) -> dict[str, Tensor]:
        """The batch of a step, cut to the length of that step."""
        if self.schedule is not None:
            return fold(batch, stage(self.schedule, step))
        if self.mixed is not None:
            return fold(batch, drawn_length(self.mixed, seed, step))
        return batch


class WindowCurriculum:
    """Changes the windows or chunks of a model's layers; chunk shifts keep their proportion.

    Args:
        model: its layers are changed in place.
        schedule: the size by the step from which it holds.

    Raises:
        ValueError: if the schedule does not end at the layers' own size.
    """

    def __init__(self, model: LongContextLM, schedule: Mapping[int, int]) -> None:
        self.schedule = schedule
        self.now: int | None = None
        self.layers = [mixer for mixer in model.mixers() if mixer.reach is not None]
        sizes = {mixer.reach for mixer in self.layers if mixer.reach is not None}
        last = schedule[max(schedule)]
        if sizes != {last}:
            raise ValueError(
                f"window_curriculum: expected its last size to be the layers' own, "
                f"{sorted(sizes) or 'none: these layers have no window'}, got {last}; change "
                "window_size or chunk_size, or the curriculum"
            )

    def set(self, step: int) -> bool:
        """Set the size of a step; returns whether it changed."""
        size = stage(self.schedule, step)
        if size == self.now:
            return False
        self.resize(size)
        return True

    def resize(self, size: int) -> None:
        """Set a size."""
        self.now = size
        for mixer in self.layers:
            mixer.set_reach(size)
