"""Scores of a model on a task, with chance, an interval, and the score without the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx_layers.evals.probing import Answers, Progress, answer, reach
from longctx_layers.evals.recall import Passkey
from longctx_layers.evals.tasks import Batch, Task
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops.checks import expect_positive

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Score:
    """How well a task was done at one length.

    Attributes:
        accuracy: part of the asked tokens that were answered exactly.
        n: independent sequences.
        chance: accuracy of a guess.
        low, high: 95 % interval (Wilson's for n trials: with several questions a sequence it is
            wider than it need be).
        accuracy_state_zeroed: the same without the memory, see `answer`; None if there is none, or
            none was probed.
        reach: tokens that the stacked windows see back; None if they see everything.
        loss: mean loss of the asked tokens, in nats.
        by_place: accuracy, loss and number of answers by their place in the sequence.
    """

    accuracy: float
    n: int
    chance: float
    low: float
    high: float
    accuracy_state_zeroed: float | None
    reach: int | None
    loss: float
    by_place: dict[int, tuple[float, float, int]]


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, `right` out of `n` trials.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    expect_positive("n", n)
    if not 0 <= right <= n:
        raise ValueError(f"right: expected a number from 0 to n = {n}, got {right}")
    p = right / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: LongContextLM,
    task: Task,
    length: int,
    *,
    n: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    probe: bool = True,
    tokens_at_once: int = 8192,
    progress: Progress | None = None,
) -> Score:
    """Score a model on `n` sequences of a length.

    The sequences depend on the task, the length, n and the seed alone: every model gets the same.

    Args:
        model: the language model; it runs in evaluation mode, and is left as it was.
        task: with its knobs.
        length: tokens of a sequence.
        n: sequences.
        batch_size: how many are read side by side.
        seed: of the sequences.
        probe: whether to score the model without its memory too.
        tokens_at_once: of how many tokens activations exist at once.
        progress: called with the number of tokens read since the last call.

    Raises:
        ValueError: if the length is too short for the task, or its ids are not the model's.
    """
    expect_positive("n", n)
    expect_positive("batch_size", batch_size)
    if task.vocabulary.size > model.config.vocab_size:
        raise ValueError(
            f"{task.name}: expected a vocabulary of at most the model's "
            f"{model.config.vocab_size} ids, got {task.vocabulary.size}; make one of its tokenizer"
        )
    whole = task.draw(n, length, torch.Generator().manual_seed(seed))
    training = model.training
    model.eval()
    try:
        found, without = [], []
        for first in range(0, n, batch_size):
            rows = slice(first, first + batch_size)
            answers, zeroed = answer(
                model,
                Batch(whole.ids[rows], whole.labels[rows], whole.asked),
                probe=probe,
                tokens_at_once=tokens_at_once,
                progress=progress,
            )
            found.append(answers)
            without += [] if zeroed is None else [zeroed.right]
    finally:
        model.train(training)
    answers = Answers(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    accuracy = _mean(answers.right)
    low, high = wilson(accuracy * n, n)
    return Score(
        accuracy=accuracy,
        n=n,
        chance=task.chance,
        low=low,
        high=high,
        accuracy_state_zeroed=_mean(torch.cat(without)) if without else None,
        reach=reach(model),
        loss=_mean(answers.loss),
        by_place={
            int(place): (_mean(answers.right[at]), _mean(answers.loss[at]), int(at.sum()))
            for place in answers.place.unique()
            for at in [answers.place == place]
        },
    )


def needle_grid(depths: int, task: Passkey) -> dict[float, Passkey]:
    """The task at evenly spaced depths, from 0 (told at the beginning) to 1.

    Source: the needle-in-a-haystack test, with a passkey for the needle.
    """
    expect_positive("depths", depths)
    if depths == 1:
        return {0.0: replace(task, depth=0.0)}
    grid = [round(i / (depths - 1), 4) for i in range(depths)]
    return {depth: replace(task, depth=depth) for depth in grid}


def effective_length(accuracies: dict[int, float], threshold: float = 0.9) -> int | None:
    """The longest length up to which every accuracy is at least the threshold; None for none."""
    longest = None
    for length in sorted(accuracies):
        if accuracies[length] < threshold:
            break
        longest = length
    return longest


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
