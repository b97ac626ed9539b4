"""Scores of a model on a task: with chance, an interval, and the score without its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx_layers.evals.probing import Answers, Progress, answer, reach
from longctx_layers.evals.statistics import Z as Z
from longctx_layers.evals.statistics import wilson as wilson
from longctx_layers.evals.tasks.base import Batch, Task
from longctx_layers.evals.tasks.passkey import Passkey
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops.checks import expect_positive


@dataclass(frozen=True)
class Score:
    """How well a model did a task at one length.

    Attributes:
        accuracy: proportion of the questions' tokens that were answered correctly.
        n: number of independent sequences.
        chance: expected accuracy of guessing.
        low, high: 95 % interval of the accuracy (Wilson's for n trials; with several questions in a
            sequence it is wider than necessary).
        accuracy_state_zeroed: the accuracy with the recurrent state cleared, see `answer`; None if
            the model has none or it was not measured.
        reach: how many tokens back the stacked windows see; None if they see everything.
        loss: mean loss of the answers, in nats.
        by_place: accuracy, loss and number of answers by their position in the sequence.
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
    """Score a model on `n` sequences of one length.

    The sequences depend on the task, the length, n and the seed only, so that all models are asked
    the same.

    Args:
        model: the language model. It runs in evaluation mode and is restored to its mode.
        task: with its options.
        length: number of tokens of a sequence.
        n: number of sequences.
        batch_size: number of sequences that are read side by side.
        seed: of the sequences.
        probe: whether to measure the accuracy with the recurrent state cleared too.
        tokens_at_once: number of tokens whose activations exist at once.
        progress: called with the number of tokens read since the last call.

    Raises:
        ValueError: if the length is too short for the task, or the task has ids that the model does
            not have.

    >>> from longctx_layers import create_model
    >>> from longctx_layers.evals import Passkey, evaluate
    >>> model = create_model(vocab_size=132, num_params="tiny", block_type="dpassm")
    >>> score = evaluate(model, Passkey(distance=64), length=128, n=4)
    >>> score.n, score.chance
    (4, 0.03125)
    """
    expect_positive("n", n)
    expect_positive("batch_size", batch_size)
    if task.vocabulary.size > model.config.vocab_size:
        raise ValueError(
            f"{task.name}: expected a vocabulary of at most the model's {model.config.vocab_size} "
            f"ids, got {task.vocabulary.size}; build one with text_vocabulary from the model's "
            "tokenizer"
        )
    sequences = task.draw(n, length, torch.Generator().manual_seed(seed))
    training = model.training
    model.eval()
    batches: list[Answers] = []
    right_without_state: list[Tensor] = []
    try:
        for first in range(0, n, batch_size):
            rows = slice(first, first + batch_size)
            answers, without_state = answer(
                model,
                Batch(sequences.ids[rows], sequences.labels[rows], sequences.asked),
                probe=probe,
                tokens_at_once=tokens_at_once,
                progress=progress,
            )
            batches.append(answers)
            if without_state is not None:
                right_without_state.append(without_state.right)
    finally:
        model.train(training)
    answers = Answers(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
    accuracy = _mean(answers.right)
    low, high = wilson(accuracy * n, n)
    by_place: dict[int, tuple[float, float, int]] = {}
    for place in answers.place.unique():
        here = answers.place == place
        by_place[int(place)] = (
            _mean(answers.right[here]),
            _mean(answers.loss[here]),
            int(here.sum()),
        )
    return Score(
        accuracy=accuracy,
        n=n,
        chance=task.chance,
        low=low,
        high=high,
        accuracy_state_zeroed=(
            _mean(torch.cat(right_without_state)) if right_without_state else None
        ),
        reach=reach(model),
        loss=_mean(answers.loss),
        by_place=by_place,
    )


def needle_grid(depths: int, task: Passkey) -> dict[float, Passkey]:
    """The task with its value at evenly spaced depths, from 0 (at the beginning) to 1.

    Source: the needle-in-a-haystack test, with a passkey as the needle.

    >>> list(needle_grid(3, Passkey()))
    [0.0, 0.5, 1.0]
    """
    expect_positive("depths", depths)
    if depths == 1:
        return {0.0: replace(task, depth=0.0)}
    grid = [round(i / (depths - 1), 4) for i in range(depths)]
    return {depth: replace(task, depth=depth) for depth in grid}


def doubling(first: int, last: int) -> list[int]:
    """Lengths from `first` to `last`, each twice the one before; `last` is always among them.

    >>> doubling(256, 1000)
    [256, 512, 1000]
    """
    lengths = [first]
    while 2 * lengths[-1] <= last:
        lengths.append(2 * lengths[-1])
    return lengths if lengths[-1] == last else [*lengths, last]


def effective_length(accuracies: Mapping[int, float], threshold: float = 0.9) -> int | None:
    """The longest length up to which every accuracy reaches the threshold; None if there is none.

    >>> effective_length({256: 1.0, 512: 0.95, 1024: 0.5, 2048: 0.97})
    512
    """
    longest = None
    for length in sorted(accuracies):
        if accuracies[length] < threshold:
            break
        longest = length
    return longest


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
