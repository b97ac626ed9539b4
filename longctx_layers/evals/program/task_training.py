"""Training a small model on a memory task: first short sequences, then mixed and long ones."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longctx_layers import LongContextLM, detach_state
from longctx_layers.evals import Mqar, Task
from longctx_layers.lm.loss import IGNORED_LABEL
from longctx_layers.training.optimization import parameter_groups, warmup_cosine

EXTRA_QUESTIONS = 8


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a task.

    Attributes:
        steps: optimizer steps.
        length: the training length: the gradient goes back over no more tokens.
        tokens: of a step.
        learning_rate: the peak.
        curriculum: part of the steps in which the length grows from a quarter to the whole.
        longest: after that lengths are mixed, from half the training length to this many times
            it. A sequence longer than the training length is read in pieces, a step each, with
            the state passed on: the model meets the states that it will have far out.
        most_pieces: of one sequence that are trained on, drawn at random; the others are only
            read.
    """

    steps: int
    length: int
    tokens: int = 8192
    learning_rate: float = 3e-3
    curriculum: float = 0.3
    longest: int = 32
    most_pieces: int = 8


def for_training(task: Task, pieces: int, extra_questions: int = EXTRA_QUESTIONS) -> Task:
    """The task with more questions in each piece of a sequence, where they give nothing away.

    mqar asks many already; a value of several tokens would be told again with each question.
    """
    if isinstance(task, Mqar) or getattr(task, "digits", 1) > 1:
        return task
    return replace(task, extra_questions=extra_questions * pieces)


def episodes(recipe: Recipe, shortest: int, seed: int) -> Iterator[int]:
    """The length of each sequence to draw, for as long as one asks; a function of the seed."""
    draw = random.Random(f"lengths {seed}")
    ramp = int(recipe.curriculum * recipe.steps)
    step = 0
    while True:
        if step < ramp:
            part = 0.25 + 0.75 * step / ramp
            length = int(recipe.length * part)
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
    """Train in place.

    Args:
        tasks: as they will be asked, in training more often; of several, each sequence draws one
            that it is long enough for.
        seed: of the sequences and of their lengths.
        extra_questions: how much more often, in each piece of a sequence.
        progress: called after each step with its number, the loss and the accuracy of the labels.

    Returns:
        `seconds`, `loss` and `accuracy` of the last steps.

    Raises:
        ValueError: if the training length is too short for the task.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    least = max(task.shortest for task in tasks)
    if least > recipe.length:
        raise ValueError(
            f"train_len: expected at least the {least} tokens that {tasks[0].name} takes, got "
            f"{recipe.length}; make it longer, or the distance shorter"
        )
    device = model.embedding.weight.device
    groups = parameter_groups(
        model,
        learning_rate=recipe.learning_rate,
        gate_learning_rate=2 * recipe.learning_rate,
        weight_decay=0.01,
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: warmup_cosine(
            step, warmup=max(1, min(50, recipe.steps // 10)), total=recipe.steps, final=0.05
        ),
    )
    # Apart from the sequences that the same seed gives an evaluation.
    generator = torch.Generator().manual_seed(random.Random(f"sequences {seed}").getrandbits(63))
    begin, step = time.perf_counter(), 0
    recent: list[tuple[float, float]] = []
    model.train()
    choose = random.Random(f"tasks {seed}")
    for length in episodes(recipe, min(task.shortest for task in tasks), seed):
        task = choose.choice([one for one in tasks if one.shortest <= length])
        rows = max(1, recipe.tokens // min(length, recipe.length))
        asking = for_training(task, math.ceil(length / recipe.length), extra_questions)
        batch = asking.draw(rows, length, generator)
        state = None
        pieces = zip(
            batch.ids.to(device).split(recipe.length, 1),
            batch.labels.to(device).split(recipe.length, 1),
            strict=True,
        )
        count = math.ceil(length / recipe.length)
        chosen = set(choose.sample(range(count), min(count, recipe.most_pieces)))
        if not asking.extra_questions:
            chosen.add(count - 1)  # where it asks, if it asks but once
        for number, (ids, labels) in enumerate(pieces):
            if number > max(chosen):
                break
            asked = (labels != IGNORED_LABEL).any()
            if not asked or number not in chosen:
                with torch.no_grad():
                    _, state = model.backbone(ids, state)
                continue
            loss, accuracy, state = _loss(model, ids, labels, state)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"step {step}: the loss is {loss.item()}; try a smaller --learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            state, step = detach_state(state), step + 1
            recent = [*recent[-49:], (loss.item(), accuracy)]
            if progress is not None:
                progress(step, loss.item(), accuracy)
            if step >= recipe.steps:
                break
        if step >= recipe.steps:
            break
    model.eval()
    losses, accuracies = zip(*recent, strict=True)
    return {
        "seconds": time.perf_counter() - begin,
        "loss": sum(losses) / len(losses),
        "accuracy": sum(accuracies) / len(accuracies),
    }


def _loss(
    model: LongContextLM, ids: Tensor, labels: Tensor, state: Any
) -> tuple[Tensor, float, Any]:
    """Mean loss of the labels, their accuracy, and the state; logits of nothing else exist."""
    hidden, state = model.backbone(ids, state)
    asked = labels != IGNORED_LABEL
    logits, wanted = model.project(hidden[asked]).float(), labels[asked]
    right = (logits.detach().argmax(-1) == wanted).double().mean().item()
    return torch.nn.functional.cross_entropy(logits, wanted), right, state
