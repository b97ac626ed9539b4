"""Lengths and windows that change in the course of the training.

A length is set by folding the batch, `[B, T]` to `[B k, T / k]`: every token is still trained on,
and each piece begins a sequence of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from longctx_layers import LongContextLM


def check_schedule(name: str, schedule: Mapping[int, int] | None) -> None:
    """Raise ValueError unless a schedule maps steps, 0 among them, to sizes of at least 1."""
    if schedule is None:
        return
    if 0 not in schedule or min(schedule) < 0 or min(schedule.values()) < 1:
        raise ValueError(
            f"{name}: expected sizes of at least 1 by the step from which on they hold, 0 "
            f"included, got {dict(schedule)}; pass e.g. {{0: 64, 1000: 128}}"
        )


def check_lengths(name: str, lengths: Sequence[int], length: int) -> None:
    """Raise ValueError unless each length divides the data's: a fold leaves no token out."""
    wrong = [n for n in lengths if n < 1 or length % n]
    if wrong or not lengths:
        raise ValueError(
            f"{name}: expected divisors of the data's sequence length {length}, got "
            f"{list(lengths)}; change {wrong}, or --data.seq_len to a common multiple"
        )


def stage(schedule: Mapping[int, int], step: int) -> int:
    """The size that holds at a step."""
    return schedule[max(begin for begin in schedule if begin <= step)]


def drawn_length(lengths: Sequence[int], seed: int, step: int) -> int:
    """The length of a step, all equally likely: the same on every rank and after a restart."""
    return random.Random(f"length {seed} {step}").choice(list(lengths))


def fold(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Rows `[B, T]` cut into rows of `length` tokens, in the order of the text."""
    return {name: tensor.reshape(-1, length) for name, tensor in batch.items()}


class WindowCurriculum:
    """Sets the windows and chunks of a model's layers; chunk shifts keep their proportion."""

    def __init__(self, model: LongContextLM, schedule: Mapping[int, int]) -> None:
        self.schedule = schedule
        self.now: int | None = None
        mixers = [block.mixer for block in model.blocks]
        self.layers = [mixer for mixer in mixers if mixer.reach is not None]
        sizes = {mixer.reach for mixer in self.layers}
        last = schedule[max(schedule)]
        if sizes != {last}:
            raise ValueError(
                f"window_curriculum: expected its last size to be the layers' own, "
                f"{sorted(sizes) or 'none: these layers have no window'}, got {last}; change "
                "window_size or chunk_size, or the curriculum"
            )

    def set(self, step: int) -> bool:
        """Set what holds at a step; returns whether that is a change."""
        size = stage(self.schedule, step)
        return size != self.now and self.resize(size)

    def resize(self, size: int) -> bool:
        """Set a size, and return True."""
        self.now = size
        for mixer in self.layers:
            mixer.set_reach(size)
        return True
