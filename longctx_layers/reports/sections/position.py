"""Loss by position on held-out text, read as a stream, beyond the training length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from longctx_layers.data.tokenizers import Tokenizer
from longctx_layers.evals import Interval, buckets, mean_interval, paired_interval, stream
from longctx_layers.reports.checkpoint import Checkpoint, tokenizers_differ
from longctx_layers.reports.content import Part, Picture, Section, Table
from longctx_layers.reports.figures import lengths_along, mark_place, new_figure, png
from longctx_layers.reports.text import Text, encoded

PIECE = 1024  # tokens that are read at once, with the state carried along
TOKENS_AT_ONCE = 8192


class Losses(NamedTuple):
    """The losses of a checkpoint on the text.

    Attributes:
        rows: `[T]` losses of each document's tokens in nats, float64; lengths differ if the
            tokenizer is not that of the first checkpoint.
        n_bytes: number of bytes that all these tokens stand for.
    """

    checkpoint: Checkpoint
    rows: list[Tensor]
    n_bytes: int

    @property
    def tokens(self) -> Tensor:
        """`[n, T]`, up to the end of the shortest document."""
        shortest = min(map(len, self.rows))
        return torch.stack([row[:shortest] for row in self.rows])

    @property
    def bits_per_byte(self) -> float:
        """The loss in a unit that does not depend on the tokenizer."""
        return sum(row.sum().item() for row in self.rows) / math.log(2) / self.n_bytes


def measure(
    checkpoints: Sequence[Checkpoint], text: Text, longest: int, documents: int
) -> list[Losses]:
    """The losses of all checkpoints that have a tokenizer, on the same text."""
    with_tokenizer = [(c, c.tokenizer) for c in checkpoints if c.tokenizer is not None]
    first = with_tokenizer[0][1]
    ids = encoded(text.documents, first, longest, documents)
    return [_losses(checkpoint, own, ids, first) for checkpoint, own in with_tokenizer]


def _losses(checkpoint: Checkpoint, own: Tokenizer, ids: Tensor, first: Tokenizer) -> Losses:
    """The losses on the text that `ids` `[n, T + 1]` of the tokenizer `first` stand for."""
    if own.fingerprint == first.fingerprint:
        batches = list(ids.split(max(1, TOKENS_AT_ONCE // PIECE)))
    else:
        texts = [first.decode(row) for row in ids.tolist()]
        batches = [torch.tensor([own.encode(part)]) for part in texts]
    total = sum(batch[:, 1:].numel() for batch in batches)
    with tqdm(total=total, desc=checkpoint.label, unit="token", disable=None) as bar:
        losses = [
            stream(checkpoint.model, batch, piece=PIECE, progress=bar.update).loss
            for batch in batches
        ]
    tokens = [row for batch in batches for row in batch[:, 1:].tolist()]
    return Losses(
        checkpoint,
        rows=[row for batch in losses for row in batch.double()],
        n_bytes=sum(len(own.decode(row).encode()) for row in tokens),
    )


def by_bucket(tokens: Tensor) -> list[tuple[int, int, float, float]]:
    """`(first, last, mean, half an interval)` of the positions 1-16, 17-32, 33-64, ..."""
    rows: list[tuple[int, int, float, float]] = []
    for first, last, _ in buckets([0.0] * tokens.shape[1]):
        interval = mean_interval(tokens[:, first - 1 : last].mean(1))
        rows.append((first, last, interval.mean, interval.half))
    return rows


def section(losses: Sequence[Losses], text: Text) -> Section:
    """A picture, the mean losses, and whether they rise beyond the training length."""
    same = not tokenizers_differ([own.checkpoint for own in losses])
    n, length = losses[0].tokens.shape
    parts: list[Part] = [
        f"{n} {text.source}, the first {length:,} tokens of each, read in pieces of {PIECE:,} with "
        "the state carried along. Intervals are of 95 % over the documents (normal).",
        Picture("loss_by_position", "Loss by position in held-out documents", draw(losses)),
        _means(losses, same),
    ]
    if not same:
        parts.append(
            "The checkpoints have different tokenizers: only the bits per byte can be compared."
        )
    elif len(losses) > 1:
        parts.append(_differences(losses))
    parts += [sentence for own in losses if (sentence := past_training(own))]
    if len({own.tokens.shape[1] for own in losses}) == 1:
        parts.append(_positions(losses))
    numbers = {
        own.checkpoint.label: {
            "documents": len(own.tokens),
            "tokens_of_each": own.tokens.shape[1],
            "nats_per_token": own.tokens.mean().item(),
            "bits_per_byte": own.bits_per_byte,
            "by_position": by_bucket(own.tokens),
        }
        for own in losses
    }
    return Section("Loss by position", parts, numbers)


def _means(losses: Sequence[Losses], same: bool) -> Table:
    rows: list[list[str]] = []
    for own in losses:
        mean = mean_interval(own.tokens.mean(1))
        rows.append(
            [
                own.checkpoint.label,
                _plus_minus(mean, ".4f"),
                f"{own.bits_per_byte:.4f}",
                f"{math.exp(min(mean.mean, 700)):.3f}" if same else "-",
                f"{sum(map(len, own.rows)):,}",
            ]
        )
    return Table(
        ["checkpoint", "loss (nats/token)", "bits/byte", "perplexity per token", "tokens"], rows
    )


def _plus_minus(interval: Interval, form: str) -> str:
    return f"{interval.mean:{form}} ± {interval.half:{form.removeprefix('+')}}"


def _differences(losses: Sequence[Losses]) -> str:
    """Differences on the same documents, which are far more certain than those of the means."""
    first = losses[0]
    differences: list[str] = []
    for own in losses[1:]:
        interval = paired_interval(own.tokens.mean(1), first.tokens.mean(1))
        differences.append(f"{own.checkpoint.label} {_plus_minus(interval, '+.4f')}")
    return (
        f"Loss minus that of {first.checkpoint.label}, paired by document (nats per token): "
        f"{'; '.join(differences)}."
    )


def past_training(losses: Losses) -> str | None:
    """A sentence on whether the loss rises beyond the training length; None if it is not known."""
    trained = losses.checkpoint.trained_length
    length = losses.tokens.shape[1]
    if not trained or trained < 2 or trained >= length:
        return None
    within = losses.tokens[:, trained // 2 : trained].mean(1)
    change = paired_interval(losses.tokens[:, trained:].mean(1), within)
    trend = "rises" if change.low > 0 else "falls" if change.high < 0 else "neither rises nor falls"
    return (
        f"{losses.checkpoint.label} was trained on {trained:,} tokens. From there to {length:,} "
        f"tokens its loss {trend}: {_plus_minus(change, '+.4f')} nats per token against the second "
        "half of the training length, paired by document."
    )


def _positions(losses: Sequence[Losses]) -> Table:
    columns = [by_bucket(own.tokens) for own in losses]
    rows = [
        [
            f"{first:,} to {last:,}",
            *(f"{column[i][2]:.3f} ± {column[i][3]:.3f}" for column in columns),
        ]
        for i, (first, last, *_) in enumerate(columns[0])
    ]
    labels = [f"{own.checkpoint.label} (nats/token)" for own in losses]
    return Table(["position (tokens)", *labels], rows)


def draw(losses: Sequence[Losses]) -> bytes:
    """Means over the positions 1-16, 17-32, ... with their intervals, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in held-out documents",
        "position in the document (tokens)",
        "loss (nats per token)",
    )
    for own in losses:
        rows = by_bucket(own.tokens)
        places = [math.sqrt(first * last) for first, last, *_ in rows]
        means = [mean for *_, mean, _ in rows]
        low = [mean - half for *_, mean, half in rows]
        high = [mean + half for *_, mean, half in rows]
        c = own.checkpoint
        axes.fill_between(places, low, high, color=c.colour, alpha=0.15, linewidth=0)
        axes.plot(places, means, color=c.colour, marker=c.mark, markersize=5, label=c.label)
    lengths_along(axes)
    trained = {own.checkpoint.trained_length for own in losses}
    for length in trained:
        if length:
            mark_place(axes, length, "training\nlength")
    return png(figure, axes, columns=min(3, len(losses)) if len(losses) < 4 else 2)
