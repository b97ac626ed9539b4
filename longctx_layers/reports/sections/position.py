"""Loss by position on held-out text, read with a state and past the training length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from longctx_layers.evals import buckets, stream
from longctx_layers.reports.checkpoint import Checkpoint, tokenizers_differ
from longctx_layers.reports.content import Part, Picture, Section, Table
from longctx_layers.reports.figures import lengths_along, mark_place, new_figure, png
from longctx_layers.reports.text import Text, encoded

PIECE = 1024  # tokens read at once, and what the state carries on from
TOKENS_AT_ONCE = 8192
NORMAL = 1.96  # half a 95 % interval, in standard errors


class Losses(NamedTuple):
    """What a checkpoint made of the text.

    Attributes:
        rows: `[T]` losses of each document's tokens in nats, float64; of another tokenizer than
            the first checkpoint's their lengths differ.
        n_bytes: what all of these tokens stand for.
    """

    checkpoint: Checkpoint
    rows: list[Tensor]
    n_bytes: int

    @property
    def tokens(self) -> Tensor:
        """`[n, T]`, as far as all documents go."""
        shortest = min(map(len, self.rows))
        return torch.stack([row[:shortest] for row in self.rows])

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return sum(row.sum().item() for row in self.rows) / math.log(2) / self.n_bytes


def measure(
    checkpoints: Sequence[Checkpoint], text: Text, longest: int, documents: int
) -> list[Losses]:
    """Of those checkpoints that have a tokenizer, all on the same text."""
    able = [one for one in checkpoints if one.tokenizer is not None]
    first = able[0].tokenizer
    ids = encoded(text.documents, first, longest, documents)
    texts = [first.decode(row) for row in ids]
    found = []
    for one in able:
        if one.tokenizer.fingerprint == first.fingerprint:
            batches = list(ids.split(max(1, TOKENS_AT_ONCE // PIECE)))
        else:
            batches = [torch.tensor([one.tokenizer.encode(part)]) for part in texts]
        total = sum(batch[:, 1:].numel() for batch in batches)
        with tqdm(total=total, desc=one.label, unit="token", disable=None) as bar:
            losses = [stream(one.model, x, piece=PIECE, progress=bar.update).loss for x in batches]
        rows = [row for batch in losses for row in batch.double()]
        tokens = (row for batch in batches for row in batch[:, 1:])
        n_bytes = sum(len(one.tokenizer.decode(row).encode()) for row in tokens)
        found.append(Losses(one, rows, n_bytes))
    return found


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of `[n]` independent values, and half of its 95 % interval (normal)."""
    return values.mean().item(), NORMAL * (values.std() / math.sqrt(len(values))).item()


def by_bucket(tokens: Tensor) -> list[tuple[int, int, float, float]]:
    """`(first, last, mean, half an interval)` of positions 1-16, 17-32, 33-64, ..."""
    places = [(first, last) for first, last, _ in buckets([0.0] * tokens.shape[1])]
    return [(a, b, *interval(tokens[:, a - 1 : b].mean(1))) for a, b in places]


def section(found: Sequence[Losses], text: Text) -> Section:
    """A picture, what the losses are and whether they rise past the training length."""
    same = not tokenizers_differ([one.checkpoint for one in found])
    n, length = found[0].tokens.shape
    parts: list[Part] = [
        f"{n} {text.source}, the first {length:,} tokens of each, read in pieces of {PIECE:,} with "
        "the state carried on. Intervals are of 95 % over the documents (normal).",
        Picture("loss_by_position", "Loss by position in held-out documents", draw(found)),
        _table(found, same),
    ]
    if not same:
        parts.append(
            "The checkpoints have different tokenizers: only the bits per byte can be compared."
        )
    elif len(found) > 1:
        parts.append(_beside_the_first(found))
    parts += [said for one in found if (said := past_training(one))]
    rows = by_bucket(found[0].tokens)
    if len({f.tokens.shape[1] for f in found}) == 1:
        columns = [by_bucket(f.tokens) for f in found]
        parts.append(
            Table(
                ["position (tokens)", *(f"{f.checkpoint.label} (nats/token)" for f in found)],
                [
                    [f"{a:,} to {b:,}", *(f"{c[i][2]:.3f} ± {c[i][3]:.3f}" for c in columns)]
                    for i, (a, b, *_) in enumerate(rows)
                ],
            )
        )
    numbers = {
        f.checkpoint.label: {
            "documents": len(f.tokens),
            "tokens_of_each": f.tokens.shape[1],
            "nats_per_token": f.tokens.mean().item(),
            "bits_per_byte": f.bits_per_byte,
            "by_position": by_bucket(f.tokens),
        }
        for f in found
    }
    return Section("Loss by position", parts, numbers)


def _table(found: Sequence[Losses], same: bool) -> Table:
    rows = []
    for one in found:
        mean, half = interval(one.tokens.mean(1))
        rows.append(
            [
                one.checkpoint.label,
                f"{mean:.4f} ± {half:.4f}",
                f"{one.bits_per_byte:.4f}",
                f"{math.exp(min(mean, 700)):.3f}" if same else "-",
                f"{sum(map(len, one.rows)):,}",
            ]
        )
    return Table(
        ["checkpoint", "loss (nats/token)", "bits/byte", "perplexity per token", "tokens"], rows
    )


def _beside_the_first(found: Sequence[Losses]) -> str:
    """Differences on the same documents: much surer than those between the means."""
    first, said = found[0], []
    for one in found[1:]:
        mean, half = interval(one.tokens.mean(1) - first.tokens.mean(1))
        said.append(f"{one.checkpoint.label} {mean:+.4f} ± {half:.4f}")
    return (
        f"Loss minus that of {first.checkpoint.label}, paired by document (nats per token): "
        f"{'; '.join(said)}."
    )


def past_training(one: Losses) -> str | None:
    """Whether the loss rises behind the training length, in words; None if nothing is known."""
    trained, length = one.checkpoint.trained_length, one.tokens.shape[1]
    if not trained or trained < 2 or trained >= length:
        return None
    before = one.tokens[:, trained // 2 : trained].mean(1)
    mean, half = interval(one.tokens[:, trained:].mean(1) - before)
    trend = "rises" if mean > half else "falls" if mean < -half else "neither rises nor falls"
    return (
        f"{one.checkpoint.label} was trained on {trained:,} tokens. Behind them, up to "
        f"{length:,}, its loss {trend}: {mean:+.4f} ± {half:.4f} nats per token against the second "
        "half of the training length, paired by document."
    )


def draw(found: Sequence[Losses]) -> bytes:
    """Means over positions 1-16, 17-32, ... with their intervals, as a PNG."""
    figure, axes = new_figure(
        "Loss by position, in held-out documents",
        "position in the document (tokens)",
        "loss (nats per token)",
    )
    for one in found:
        rows = by_bucket(one.tokens)
        places = [math.sqrt(first * last) for first, last, *_ in rows]
        means, halves = ([row[i] for row in rows] for i in (2, 3))
        low = [m - h for m, h in zip(means, halves, strict=True)]
        high = [m + h for m, h in zip(means, halves, strict=True)]
        c = one.checkpoint
        axes.fill_between(places, low, high, color=c.colour, alpha=0.15, linewidth=0)
        axes.plot(places, means, color=c.colour, marker=c.mark, markersize=5, label=c.label)
    lengths_along(axes)
    for trained in {f.checkpoint.trained_length for f in found if f.checkpoint.trained_length}:
        mark_place(axes, trained, "training\nlength")
    return png(figure, axes, columns=min(3, len(found)) if len(found) < 4 else 2)
