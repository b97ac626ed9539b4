"""The loss of every token: of short sequences, and of texts far longer than the training length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.evals.probing import Progress, zero_memory
from longctx_layers.evals.statistics import accuracy_interval as accuracy_interval
from longctx_layers.evals.tasks.drift_curve import Slope as Slope
from longctx_layers.evals.tasks.drift_curve import drift as drift
from longctx_layers.layers.parameters import device_of
from longctx_layers.lm.model import LongContextLM, ModelState
from longctx_layers.ops.checks import expect_positive


class Stream(NamedTuple):
    """What a model predicted of a text that it read as a stream.

    Attributes:
        loss: `[B, T]`, of each next token, in nats.
        right: `[B, T]`, whether the next token was the most likely one.
        state_bytes: size of one row's state at the end.
    """

    loss: Tensor
    right: Tensor
    state_bytes: int


@torch.no_grad()
def token_losses(
    model: Callable[[Tensor], Tensor],
    ids: Tensor,
    *,
    length: int | None = None,
    tokens_at_once: int = 8192,
) -> Tensor:
    """The loss of every next token, in nats: how well does a model predict a text?

    It works with any model that returns logits; `stream` carries a state along and so reads texts
    of any length.

    Args:
        model: maps ids `[B, T]` to logits `[B, T, vocab_size]`; in evaluation mode.
        ids: `[B, T + 1]` int64.
        length: read the ids in sequences of this length, each without the context before it. T
            must be a multiple. By default all at once.
        tokens_at_once: number of tokens whose logits exist at once; at least one sequence.

    Returns:
        `[B, T]` float32.

    >>> import torch
    >>> from longctx_layers import create_model
    >>> model = create_model(vocab_size=256, num_params="tiny").eval()
    >>> token_losses(model, torch.randint(256, (2, 65)), length=16).shape
    torch.Size([2, 64])
    """
    total = ids.shape[1] - 1
    length = total if length is None else length
    expect_positive("length", length)
    expect_positive("tokens_at_once", tokens_at_once)
    if total % length:
        raise ValueError(
            f"length: expected a divisor of the {total} tokens of a row, got {length}; cut the ids"
        )
    x = ids[:, :-1].reshape(-1, length)
    y = ids[:, 1:].reshape(-1, length)
    rows = max(1, tokens_at_once // length)
    losses = [
        F.cross_entropy(model(a).float().flatten(0, 1), b.flatten(), reduction="none")
        for a, b in zip(x.split(rows), y.split(rows), strict=True)
    ]
    return torch.cat(losses).view(len(ids), total)


def rotations(ids: Tensor, count: int, part: int) -> Tensor:
    """The text from `count` starting points, so that the same part is read at many positions.

    Args:
        ids: `[T]`, a text. It is cut to a multiple of `count * part` tokens.
        count: number of starting points.
        part: number of tokens of a part.

    Returns:
        `[count, T]`, each row the whole text, continued at its beginning.

    >>> import torch
    >>> rotations(torch.arange(6), count=3, part=2).tolist()
    [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [4, 5, 0, 1, 2, 3]]
    """
    expect_positive("count", count)
    expect_positive("part", part)
    length = len(ids) // (count * part) * (count * part)
    if length == 0:
        raise ValueError(
            f"text: expected at least {count * part} tokens for {count} rotations of parts of "
            f"{part}, got {len(ids)}; use a longer text or fewer rotations"
        )
    return torch.stack([ids[:length].roll(-i * (length // count)) for i in range(count)])


@torch.no_grad()
def stream(
    model: LongContextLM,
    ids: Tensor,
    *,
    piece: int = 1024,
    forget_every: int | None = None,
    progress: Progress | None = None,
) -> Stream:
    """Predict every next token of texts of any length; memory does not grow with the length.

    Args:
        model: the language model. It runs in evaluation mode and is restored to its mode.
        ids: `[B, T + 1]` int64.
        piece: number of tokens of a row that are read at once.
        forget_every: clear the recurrent state whenever this many tokens have been read; None for
            never.
        progress: called with the number of tokens read since the last call.

    >>> import torch
    >>> from longctx_layers import create_model
    >>> model = create_model(vocab_size=256, num_params="tiny", block_type="dpassm")
    >>> stream(model, torch.randint(256, (1, 301)), piece=64).loss.shape
    torch.Size([1, 300])
    """
    expect_positive("piece", piece)
    device = device_of(model.embedding, model)
    training = model.training
    model.eval()
    losses: list[Tensor] = []
    right: list[Tensor] = []
    state: ModelState | None = None
    size = piece if forget_every is None else min(piece, forget_every)
    since = 0  # tokens since the state was cleared
    try:
        for x, y in zip(ids[:, :-1].split(size, 1), ids[:, 1:].split(size, 1), strict=True):
            if forget_every is not None and state is not None and since >= forget_every:
                state = zero_memory(model, state)
                since = 0
            logits, state = model(x.to(device), state, return_state=True)
            labels = y.to(device)
            loss = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
            losses.append(loss.cpu())
            right.append((logits.argmax(-1) == labels).cpu())
            since += size
            if progress is not None:
                progress(x.numel())
    finally:
        model.train(training)
    total = sum(t.numel() * t.element_size() for layer in state or () for t in layer)
    return Stream(torch.cat(losses, 1), torch.cat(right, 1), total // len(ids))


def buckets(losses: Sequence[float]) -> list[tuple[int, int, float]]:
    """Mean loss over the positions 1-16, 17-32, 33-64, ...: `(first, last, mean)`.

    >>> buckets([2.0] * 16 + [1.0] * 8)
    [(1, 16, 2.0), (17, 24, 1.0)]
    """
    means: list[tuple[int, int, float]] = []
    low = 0
    high = 16
    while low < len(losses):
        part = losses[low:high]
        means.append((low + 1, low + len(part), sum(part) / len(part)))
        low = high
        high *= 2
    return means
