"""Training the byte-level models that some tables are about."""

from __future__ import annotations

import math
import random

from torch import Tensor

from longctx_layers import LongContextLM, parameter_groups
from longctx_layers.data.byte_text import windows
from longctx_layers.training.loop import ProgressBar, fit


def train_on_text(
    name: str,
    model: LongContextLM,
    text: list[bytes],
    *,
    steps: int,
    batch_size: int,
    sequence_length: int,
) -> None:
    """Train in place on random windows of the text, as examples/demo.py does."""
    draw = random.Random(0)
    warmup = max(1, steps // 10)

    def loss_of_step(step: int) -> Tensor:
        batch = windows(text, batch_size, sequence_length, draw)
        return model.loss(batch[:, :-1], batch[:, 1:])

    def schedule(step: int) -> float:
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warmup) * cosine

    fit(
        parameter_groups(model, weight_decay=0.05),
        loss_of_step,
        steps,
        learning_rate=2e-3,
        schedule=schedule,
        clipped=model.parameters(),
        progress=ProgressBar(name, steps, tokens=batch_size * sequence_length),
    )
