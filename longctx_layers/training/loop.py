"""A small training loop for small experiments, without Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longctx_layers.training.optimization import warmup_cosine


def fit(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    schedule: Callable[[int], float] | None = None,
    clipped: Iterable[nn.Parameter] | None = None,
    max_norm: float = 1.0,
    progress: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train in place: AdamW, a schedule of the learning rate, and clipping of the gradients.

    Args:
        parameters: to train, or groups of them with options of their own, as torch's optimizers
            take them.
        loss_of_step: the loss, a scalar with a graph, of step 0, 1, ...
        steps: how many.
        learning_rate, weight_decay, betas: of AdamW; groups may have their own.
        schedule: the factor of the learning rate at a step. By default it rises over the first
            tenth of the steps, and then falls along a cosine to a tenth.
        clipped: the parameters whose gradients are clipped together; by default all, in the order
            of the groups. (Their norm is a sum, whose last bit depends on the order.)
        max_norm: to which the norm of all gradients is clipped.
        progress: called after each step with the number of steps done and the loss; see
            `ProgressBar`.

    Returns:
        The loss of each step.

    Raises:
        ValueError: if the loss is NaN or infinite.

    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> line = nn.Linear(1, 1)
    >>> losses = fit(line.parameters(), lambda step: (line(x) - 2 * x).square().mean(), 50,
    ...              learning_rate=0.1)
    >>> len(losses), losses[-1] < losses[0]
    (50, True)
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas, weight_decay=weight_decay)
    groups = optimizer.param_groups
    in_groups = [parameter for group in groups for parameter in group["params"]]
    clipped = in_groups if clipped is None else list(clipped)
    if schedule is None:
        warmup = max(1, steps // 10)

        def schedule(step: int) -> float:
            return warmup_cosine(step, warmup=warmup, total=steps, final=0.1)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of_step(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"step {step}: the loss is {losses[-1]}; try a smaller --learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, max_norm)
        optimizer.step()
        scheduler.step()
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


class ProgressBar:
    """Shows the loss and the speed of `fit`: a bar in a terminal, otherwise a line now and then.

    Args:
        name: of what is trained, before each line.
        steps: in all.
        tokens: of a step; with them the speed is shown.
        lines: how many lines are printed where there is no bar.

    Attributes:
        tokens_per_second: so far.

    >>> progress = ProgressBar("example", steps=4, lines=2)
    >>> for step in range(1, 5):
    ...     progress(step, 1 / step)
    example, step 2: loss 0.500
    example, step 4: loss 0.250
    """

    def __init__(self, name: str, steps: int, *, tokens: int = 0, lines: int = 10) -> None:
        from tqdm import tqdm

        self.name = name
        self.tokens = tokens
        self.tokens_per_second = 0.0
        self._bar = tqdm(total=steps, desc=name, unit="step", disable=None)
        self._steps_per_line = max(1, steps // lines)
        self._begin = time.perf_counter()

    def __call__(self, step: int, loss: float) -> None:
        """Show that `step` steps are done."""
        self.tokens_per_second = step * self.tokens / (time.perf_counter() - self._begin)
        text = f"loss {loss:.3f}"
        if self.tokens:
            text += f", {self.tokens_per_second:,.0f} tokens/s"
        self._bar.set_postfix_str(text)
        self._bar.update()
        if step == self._bar.total:
            self._bar.close()
        if self._bar.disable and step % self._steps_per_line == 0:
            print(f"{self.name}, step {step}: {text}", flush=True)
