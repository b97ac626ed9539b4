"""Streaming perplexity: the loss by position in a text far longer than the model was trained on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx_layers.evals.probing import Progress, zero_memory
from longctx_layers.evals.scoring import Z, wilson
from longctx_layers.layers.parameters import device_of
from longctx_layers.lm.model import LongContextLM
from longctx_layers.ops.checks import expect_positive

STRETCH = 64  # tokens of text that are taken for alike


class Stream(NamedTuple):
    """What a model knew of a text that it read as a stream.

    Attributes:
        loss: `[B, T]`, of each next token, in nats.
        right: `[B, T]`, whether it was the likeliest.
        state_bytes: size of one row's state at the end.
    """

    loss: Tensor
    right: Tensor
    state_bytes: int


class Slope(NamedTuple):
    """A change of the loss with the position, nats per 1000 tokens, and its 95 % interval."""

    mean: float
    low: float
    high: float


def rotations(ids: Tensor, count: int, part: int) -> Tensor:
    """`[count, T]`: the text `[T]` begun at `count` places, so that each of its parts is read at
    as many positions. T is cut to a multiple of `count * part`.
    """
    expect_positive("count", count)
    expect_positive("part", part)
    length = len(ids) // (count * part) * (count * part)
    if length == 0:
        raise ValueError(
            f"text: expected at least {count * part} tokens for {count} rotations of parts of "
            f"{part}, got {len(ids)}; take a longer text, or fewer rotations"
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
    """Read `[B, T + 1]` ids as streams and score every next token; memory does not grow with T.

    Args:
        model: the language model; it runs in evaluation mode, and is left as it was.
        piece: tokens of a row read at once.
        forget_every: tokens after which the recurrent state is emptied again and again; None for
            never.
        progress: called with the number of tokens read since the last call.
    """
    expect_positive("piece", piece)
    device = device_of(model.embedding, model)
    training = model.training
    model.eval()
    losses, right, state = [], [], None
    size = piece if forget_every is None else min(piece, forget_every)
    since = 0
    try:
        for x, y in zip(ids[:, :-1].split(size, 1), ids[:, 1:].split(size, 1), strict=True):
            if forget_every is not None and state is not None and since >= forget_every:
                state, since = zero_memory(model, state), 0
            logits, state = model(x.to(device), state, return_state=True)
            wanted = y.to(device)
            loss = F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
            losses.append(loss.cpu())
            right.append((logits.argmax(-1) == wanted).cpu())
            since += size
            if progress is not None:
                progress(x.numel())
    finally:
        model.train(training)
    total = sum(t.numel() * t.element_size() for layer in state or () for t in layer)
    return Stream(torch.cat(losses, 1), torch.cat(right, 1), total // len(ids))


def drift(loss: Tensor, part: int, skip: int = 0) -> Slope:
    """The slope of the loss over the position, the text held fixed.

    Row i of `[B, T]` is `rotations(...)[i]`, so that each part of the text is there at B
    positions. Its own mean is taken off, since some parts are harder than others, and one line is
    fitted to what is left. The interval takes the parts for independent (a cluster-robust error).

    Args:
        loss: `[B, T]`, in nats.
        part: tokens of a part.
        skip: positions left out at the beginning, where there is little context yet.

    Raises:
        ValueError: for fewer than two rows or ten parts.
    """
    rows, length = loss.shape
    parts = length // part
    if rows < 2 or parts < 10 or parts % rows:
        raise ValueError(
            f"drift: expected at least 2 rotations of at least 10 parts, a multiple of their "
            f"number, got {rows} of {parts}; read a longer text, or in smaller parts"
        )
    means = loss[:, : parts * part].double().view(rows, parts, part).mean(-1)
    position = (torch.arange(parts, dtype=torch.float64) + 0.5) * part / 1000
    shift = parts // rows * torch.arange(rows)
    index = (torch.arange(parts) - shift[:, None]) % parts  # where a part of the text stands
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


def accuracy_interval(right: Tensor, behind: slice) -> tuple[float, float]:
    """The 95 % interval of the accuracy at some positions of `rotations(...)`.

    The same tokens are read in every rotation, and neighbours are alike: stretches of the text are
    what is taken for independent (a cluster-robust error). It is never narrower than Wilson's over
    as many tokens as the text has, which is more than none where all were right, or all wrong.

    Args:
        right: `[rotations, T]`, whether each token was known.
        behind: the positions.
    """
    rows, length = right.shape
    shift = length // rows * torch.arange(rows)
    stretch = (torch.arange(length) + shift[:, None]) % length // STRETCH
    chosen, at = right[:, behind].double().flatten(), stretch[:, behind].flatten()
    empty = torch.zeros(int(stretch.max()) + 1, dtype=torch.float64)
    known = empty.index_add(0, at, chosen)
    asked = empty.index_add(0, at, torch.ones_like(chosen))
    accuracy = chosen.mean().item()
    count = int((asked > 0).sum())
    error = (known - accuracy * asked).square().sum().sqrt().item() / len(chosen)
    half = Z * error * math.sqrt(count / max(1, count - 1))
    tokens = min(len(chosen), length)
    low, high = wilson(accuracy * tokens, tokens)
    return max(0.0, min(low, accuracy - half)), min(1.0, max(high, accuracy + half))


def buckets(losses: list[float]) -> list[tuple[int, int, float]]:
    """Mean loss over positions 1-16, 17-32, 33-64, ...: `(first, last, mean)`."""
    found, low, high = [], 0, 16
    while low < len(losses):
        part = losses[low:high]
        found.append((low + 1, low + len(part), sum(part) / len(part)))
        low, high = high, 2 * high
    return found
