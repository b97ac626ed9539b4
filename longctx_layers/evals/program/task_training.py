"""Training a small model on a memory task: short sequences first, then mixed and long ones."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers import LongContextLM, detach_state
from longctx_layers.evals import Task
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.lm.model import ModelState
from longctx_layers.training.loop import fit
from longctx_layers.training.optimization import parameter_groups, warmup_cosine

EXTRA_QUESTIONS = 8
RECENT = 50  # steps whose mean is the result


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a task.

    Attributes:
        steps: number of optimizer steps.
        length: the training length; gradients go back over no more tokens.
        tokens: number of tokens of a step.
        learning_rate: the peak.
        curriculum: the proportion of the steps in which the length grows from a quarter to the
            whole training length.
        longest: after that, lengths are drawn from half the training length to this multiple of
            it. A longer sequence is read in pieces, one step each, with the state carried along:
            the model meets states as they are far into a sequence.
        most_pieces: the number of pieces of a sequence that are trained on, drawn at random; the
            others are only read.
    """

    steps: int
    length: int
    tokens: int = 8192
    learning_rate: float = 3e-3
    curriculum: float = 0.3
    longest: int = 32
    most_pieces: int = 8


def for_training(task: Task, pieces: int, extra_questions: int = EXTRA_QUESTIONS) -> Task:
    """The task with more questions in every piece, if those do not give the answer away."""
    return task.with_extra_questions(extra_questions * pieces)


def episodes(recipe: Recipe, shortest: int, seed: int) -> Iterator[int]:
    """The lengths of the sequences to train on, without end, reproducible from the seed."""
    draw = random.Random(f"lengths {seed}")
    ramp = int(recipe.curriculum * recipe.steps)
    step = 0
    while True:
        if step < ramp:
            length = int(recipe.length * (0.25 + 0.75 * step / ramp))
        else:
            length = int(recipe.length * 2 ** draw.uniform(-1, math.log2(recipe.longest)))
        length = max(shortest, length)
        step += min(recipe.most_pieces, math.ceil(length / recipe.length))
        yield length


def train(
    model: LongContextLM,
    tasks: Task | Sequence[Task],
    recipe: Recipe,
    *,
    seed: int = 0,
    extra_questions: int = EXTRA_QUESTIONS,
    progress: Callable[[int, float, float], object] | None = None,
) -> dict[str, Any]:
    """Train a model on memory tasks, in place.

    Args:
        model: left in evaluation mode.
        tasks: as they will be measured. Of several, each sequence draws one that fits its length.
        recipe: lengths, steps and learning rate.
        seed: of the sequences and of their lengths.
        extra_questions: number of further questions in each piece of a sequence.
        progress: called after each step with its number, the loss and the accuracy of the answers.

    Returns:
        `seconds`, and the mean `loss` and `accuracy` of the last steps.

    Raises:
        ValueError: if the training length is too short for the task, or the loss is not finite.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    least = max(task.shortest for task in tasks)
    if least > recipe.length:
        raise ValueError(
            f"train_len: expected at least the {least} tokens that {tasks[0].name} needs, got "
            f"{recipe.length}; make it larger, or the distance smaller"
        )
    groups = parameter_groups(
        model,
        learning_rate=recipe.learning_rate,
        gate_learning_rate=2 * recipe.learning_rate,
        weight_decay=0.01,
    )
    warmup = max(1, min(50, recipe.steps // 10))
    losses = _losses(model, tasks, recipe, seed, extra_questions)
    accuracies: list[float] = []

    def loss_of_step(step: int) -> Tensor:
        loss, accuracy = next(losses)
        accuracies.append(accuracy)
        return loss

    def report(step: int, loss: float) -> None:
        if progress is not None:
            progress(step, loss, accuracies[-1])

    begin = time.perf_counter()
    model.train()
    trained = fit(
        groups,
        loss_of_step,
        recipe.steps,
        betas=(0.9, 0.98),
        schedule=lambda step: warmup_cosine(step, warmup=warmup, total=recipe.steps, final=0.05),
        clipped=model.parameters(),
        progress=report,
    )
    model.eval()
    recent = trained[-RECENT:]
    return {
        "seconds": time.perf_counter() - begin,
        "loss": sum(recent) / len(recent),
        "accuracy": sum(accuracies[-RECENT:]) / len(recent),
    }


def _losses(
    model: LongContextLM,
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int,
    extra_questions: int,
) -> Iterator[tuple[Tensor, float]]:
    """The loss and the accuracy of each step; the next is computed after the model's update."""
    device = model.embedding.weight.device
    # Different sequences from those that an evaluation draws from the same seed.
    generator = torch.Generator().manual_seed(random.Random(f"sequences {seed}").getrandbits(63))
    choose = random.Random(f"tasks {seed}")
    for length in episodes(recipe, min(task.shortest for task in tasks), seed):
        fitting = [task for task in tasks if task.shortest <= length]
        count = math.ceil(length / recipe.length)
        task = for_training(choose.choice(fitting), count, extra_questions)
        rows = max(1, recipe.tokens // min(length, recipe.length))
        batch = task.draw(rows, length, generator)
        pieces = zip(
            batch.ids.to(device).split(recipe.length, 1),
            batch.labels.to(device).split(recipe.length, 1),
            strict=True,
        )
        chosen = set(choose.sample(range(count), min(count, recipe.most_pieces)))
        if not task.extra_questions:
            chosen.add(count - 1)  # the only question may be at the end
        state: ModelState | None = None
        for number, (ids, labels) in enumerate(pieces):
            if number > max(chosen):
                break
            if number not in chosen or not (labels != IGNORED_LABEL).any():
                with torch.no_grad():
                    _, state = model.backbone(ids, state)
                continue
            loss, accuracy, state = _loss(model, ids, labels, state)
            yield loss, accuracy
            state = detach_state(state)


def _loss(
    model: LongContextLM, ids: Tensor, labels: Tensor, state: ModelState | None
) -> tuple[Tensor, float, ModelState]:
    """Mean loss and accuracy of the answers, and the state. Only the answers' logits exist."""
    hidden, state = model.backbone(ids, state)
    asked = labels != IGNORED_LABEL
    logits = model.project(hidden[asked]).float()
    answers = labels[asked]
    accuracy = (logits.detach().argmax(-1) == answers).double().mean().item()
    return F.cross_entropy(logits, answers), accuracy, state
